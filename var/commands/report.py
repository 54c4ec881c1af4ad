"""Compare runs and evaluations in tables, figures and one page per run: `python report.py runs/a runs/b …`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

import argparse
import gc
from pathlib import Path

from var.config.entry import name_command, run_command


def main() -> None:
    """Write a report. Folders without a finished run or an evaluation are listed and skipped."""
    parser = argparse.ArgumentParser(
        prog=" ".join(name_command("report")).removeprefix("python "),
        description="Compare runs and evaluations: tables (Markdown, LaTeX, CSV), figures, and one HTML page per run. "
        "Runs that differ only in seeds are one configuration, with standard errors over seeds. "
        "If there are exactly two configurations, the report also has their differences.",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        help="folders of runs, of evaluations (eval.py), of python -m experiments.tabular, or folders that contain "
        "any number of them",
    )
    parser.add_argument("--out", default="report", type=Path, help="folder of the report (default: %(default)s)")
    parser.add_argument(
        "--format", default="png", choices=("png", "pdf", "svg"), help="file format of the figures (default: png)"
    )
    parser.add_argument(
        "--shown",
        default=8,
        type=int,
        help="number of configurations in figures; those with the highest reward are drawn (default: 8)",
    )
    parser.add_argument(
        "--pages",
        default=20,
        type=int,
        help="number of runs that get an HTML page, in the order of the table (default: 20)",
    )
    parser.add_argument(
        "--wandb", metavar="ENTITY/PROJECT", help="save the same panels as a view of this Weights & Biases project"
    )
    arguments = parser.parse_args()
    if not arguments.folders and not arguments.wandb:
        parser.error("nothing to report. Give folders, or --wandb ENTITY/PROJECT.")

    from var.utils.console import say

    if arguments.folders:
        from var.report.read import find_records
        from var.report.write import write_report

        gc.enable()  # see run_command
        found = find_records(arguments.folders)
        say(write_report(found, arguments.out, arguments.format, arguments.shown, arguments.pages))
        for problem in found.problems[:10]:
            say(f"Skipped: {problem}")
        if len(found.problems) > 10:
            say(f"Skipped: {len(found.problems) - 10} more")
        pages = f"; a page per run in {arguments.out / 'pages'}" if found.runs and arguments.pages else ""
        say(f"Report: {arguments.out / 'report.md'}{pages}")
    if arguments.wandb:
        from var.report.view import save_view

        say(f"View: {save_view(arguments.wandb)}")


def command() -> None:
    """Run the command line."""
    run_command(main)


if __name__ == "__main__":
    command()
