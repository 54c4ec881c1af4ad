"""Runs and evaluations in; tables, figures and a page a run out: `python report.py runs/a runs/b …`."""

import argparse
from pathlib import Path

from var.config.entry import run_command


def main() -> None:
    """What is no finished run is named and counted, and the others are reported."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Tables (Markdown, LaTeX, CSV), figures, and one HTML page a run. Runs that differ in seeds alone "
        "are one configuration, with standard errors over seeds; two configurations are compared.",
    )
    parser.add_argument(
        "folders", nargs="*", type=Path,
        help="a run's, an evaluation's, python -m experiments.tabular's, or a folder of any number of them",
    )  # fmt: skip
    parser.add_argument("--out", default="report", type=Path, help="the report's folder (default: %(default)s)")
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"), help="of figures (default: png)")
    parser.add_argument(
        "--shown",
        default=8,
        type=int,
        help="configurations that figures draw, those of the highest reward (default: 8)",
    )
    parser.add_argument("--pages", default=20, type=int, help="runs with a page, the table's first (default: 20)")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="save the same panels as a view of this W&B project")
    given = parser.parse_args()
    if not given.folders and not given.wandb:
        parser.error("nothing to report on: name folders, or --wandb")

    from var.utils.console import say

    if given.folders:
        from var.report.read import find
        from var.report.write import report

        found = find(given.folders)
        say(report(found, given.out, given.format, given.shown, given.pages))
        for problem in found.problems[:10]:
            say(f"Left out: {problem}")
        if len(found.problems) > 10:
            say(f"Left out: {len(found.problems) - 10} more")
        say(f"Report: {given.out / 'report.md'}")
    if given.wandb:
        from var.report.view import save

        say(f"View: {save(given.wandb)}")


if __name__ == "__main__":
    run_command(main)
