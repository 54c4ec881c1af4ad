"""Write the folder of a report: report.md, its tables and figures, and one HTML page per run."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import pandas as pd
from jinja2 import TemplateError

from var.report import figures, tables
from var.report.groups import Group, group_runs
from var.report.page import render_page
from var.report.read import UNREADABLE, Found, RunRecord
from var.utils.errors import UserError
from var.utils.files import atomic, make_file_name, replace_surrogates

SHOWN_ROWS = 50  # of a table in report.md and in LaTeX; CSV has all rows
NOTE = (
    "± is one standard error: over seeds if a configuration has several, otherwise clustered by prompt. "
    "In a figure, each configuration has its own color."
)


def write_report(found: Found, out: Path, kind: Literal["png", "pdf", "svg"], shown: int, pages: int) -> str:
    """Write the report to the folder `out`, and return its tables as Markdown.

    Args:
        found: the runs and evaluations.
        out: the folder of the report.
        kind: the file format of the figures.
        shown: the number of configurations in figures. Those with the highest reward are drawn.
        pages: the number of runs that get a page, in the order of the table.
    """
    if not found:
        problems = "\n".join(f"  {line}" for line in found.problems[:20])
        raise UserError(f"nothing to report: no finished run, no evaluation\n{problems}")
    notes = list(found.problems)
    groups, common = group_runs(found.runs, notes)
    parts = [f"# {len(found.runs)} runs, {len(groups)} configurations, {len(found.evaluations)} evaluations"]

    def add_table(title: str, name: str, table: pd.DataFrame, note: str = "", code: bool = True) -> None:
        first = table[:SHOWN_ROWS]
        _write(out / "tables" / f"{name}.csv", tables.to_csv(table))
        _write(out / "tables" / f"{name}.tex", tables.to_latex(first, code))
        omitted = f"{SHOWN_ROWS} of {len(table)} rows; tables/{name}.csv has all." if len(table) > SHOWN_ROWS else ""
        parts.append("\n\n".join(filter(None, [f"## {title}", note, tables.to_markdown(first, code), omitted])))

    drawn = groups
    if len(groups) > min(shown, SHOWN_ROWS):
        groups = sorted(groups, key=lambda group: -group.outcome)
        drawn = groups[:shown]
    if groups:
        shared = f"All with `{' '.join(common).replace('`', chr(39))}`. " if common and len(groups) > 1 else ""
        add_table("Configurations", "configurations", tables.tabulate_groups(groups), shared + NOTE)
        _write(out / "tables" / "runs.csv", tables.to_csv(tables.tabulate_runs(found.runs)))
    if len(groups) == 2:
        add_table("Differences in results", "difference", tables.compare_groups(*groups), code=False)
    if len(drawn) > 1:
        add_table("Differences in configuration", "settings", tables.compare_settings(drawn))
    if found.evaluations:
        table = tables.tabulate_evaluations(found.evaluations)
        add_table("Evaluations", "evaluations", table, "± is one standard error, clustered by prompt.", code=False)
    if len(found.evaluations) == 2:
        try:
            table = tables.compare_evaluations(*found.evaluations)
        except UNREADABLE as error:
            notes.append(f"the answers.jsonl files of the evaluations are inconsistent {_name(error)}")
        else:
            if len(table):
                add_table("Differences between the evaluations", "evaluations_difference", table, code=False)
    all_tables = replace_surrogates("\n\n".join(parts))

    sketches: dict[str, tuple[str, Callable[[Path], bool]]] = {
        "curves": ("Curves", lambda path: figures.draw_curves(drawn, path)),
        "frontier": ("Reward against KL", lambda path: figures.draw_frontier(groups, path, shown)),
        "verdicts": ("Win, tie, loss", lambda path: figures.draw_verdicts(found.evaluations, drawn, path)),
        "lengths": ("Lengths before and after training", lambda path: figures.draw_lengths(drawn, path)),
        "weights": ("Weights", lambda path: figures.draw_weights(drawn, path)),
        "cost": ("Throughput, time and memory", lambda path: figures.draw_cost(drawn, path)),
        "variance": ("Variance of the estimators of Z", lambda path: figures.draw_variance(found.tables, path)),
    }
    which = f", the {len(drawn)} of {len(groups)} configurations with the highest reward" if drawn != groups else ""
    for name, (title, draw) in sketches.items():
        path = out / "figures" / f"{name}.{kind}"
        try:
            if draw(path):
                parts.append(f"## {title}{which}\n\n![{title}](figures/{path.name})")
        except UNREADABLE as error:
            notes.append(f"figures/{path.name}: not drawn, because files of its runs are inconsistent {_name(error)}")
    ordered = [run for group in groups for run in group.runs]
    if written := write_pages(ordered[:pages], out / "pages", notes):
        links = "\n".join(f"- [{_escape(run.name)}](pages/{quote(path.name)})" for run, path in written)
        omitted = f"\n\n{len(written)} of {len(found.runs)} runs have a page." if len(written) < len(found.runs) else ""
        parts.append(f"## Pages\n\n{links}{omitted}")
    if notes:
        parts.append(f"## Skipped ({len(notes)})\n\n" + "\n".join(f"- {_escape(note)}" for note in notes))
    _write(out / "report.md", "\n\n".join(parts) + "\n")
    return all_tables


def write_pages(runs: list[RunRecord], folder: Path, notes: list[str]) -> list[tuple[RunRecord, Path]]:
    """Write a page per run, named after its folder, and return the runs and their pages.

    Repeated names are numbered. A line about each run whose page cannot be written is appended to `notes`.
    """
    pages = dict[Path, RunRecord]()
    for run in runs:
        name = make_file_name(run.name)
        path, number = folder / f"{name}.html", 2
        while path in pages:
            path, number = folder / f"{name}-{number}.html", number + 1
        try:
            _write(path, render_page(run))
        except (*UNREADABLE, TemplateError) as error:
            notes.append(f"{run.folder}: no page, because its files are inconsistent {_name(error)}")
        else:
            pages[path] = run
    return [(run, path) for path, run in pages.items()]


def plot(folders: list[Path], target: Path) -> None:
    """Draw the curves of runs, finished or not, each under the name of its folder."""
    runs = [RunRecord(folder, {}, {}, {}) for folder in folders]
    figures.draw_curves([Group(run.folder.name.rsplit("-", 1)[0], [run]) for run in runs], target)


def _name(error: Exception) -> str:
    return f"({type(error).__name__}: {error})"


def _escape(text: str) -> str:
    """Return a text on one line, without Markdown markup."""
    return tables.escape_markdown(" ".join(text.split()))


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, encoding="utf-8") as file:
        file.write(replace_surrogates(content))
