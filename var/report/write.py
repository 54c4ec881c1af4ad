"""A report's folder: report.md with its tables and figures, and a page a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from var.report import figures, tables
from var.report.page import page
from var.report.read import UNREADABLE, Found, Group, Run, grouped
from var.report.tables import Table
from var.utils.errors import UserError
from var.utils.files import atomic, replace_surrogates

ROWS = 50  # of a table that is read; CSV has all

NOTE = (
    "± is one standard error: over seeds where a configuration has several, else clustered by prompt. Of a figure's "
    "configurations each has its colour."
)


def report(found: Found, out: Path, kind: Literal["png", "pdf", "svg"], shown: int, pages: int) -> str:
    """Writes the report of what was found; returns its tables. shown: configurations that figures draw, those of the
    highest reward; pages: runs that have a page, the first so many of the table."""
    if not found:
        listed = "\n".join(f"  {line}" for line in found.problems[:20])
        raise UserError(f"nothing to report: no finished run, no evaluation\n{listed}")
    notes = list(found.problems)
    groups, common = grouped(found.runs, notes)
    parts = [f"# {len(found.runs)} runs, {len(groups)} configurations, {len(found.evaluations)} evaluations"]

    def add(title: str, name: str, table: Table, told: str = "") -> None:
        for suffix, content in (("csv", table.csv()), ("tex", _first(table).latex())):
            _write(out / "tables" / f"{name}.{suffix}", content)
        rest = f"\n\n{ROWS} of {len(table.rows)} rows; tables/{name}.csv has all." if len(table.rows) > ROWS else ""
        parts.append(f"## {title}\n\n{told + chr(10) * 2 if told else ''}{_first(table).markdown()}{rest}")

    drawn = groups
    if len(groups) > min(shown, ROWS):
        groups = sorted(groups, key=lambda group: -group.outcome)
        drawn = groups[:shown]
    if groups:
        told = f"All with `{' '.join(common).replace('`', chr(39))}`. {NOTE}" if common and len(groups) > 1 else NOTE
        add("Configurations", "configurations", tables.configurations(groups), told)
        _write(out / "tables" / "runs.csv", tables.every_run(found.runs).csv())
    if len(groups) == 2:
        add("What differs in outcome", "difference", tables.outcomes_apart(*groups))
    if len(drawn) > 1:
        add("What differs in configuration", "settings", tables.settings_apart(drawn))
    if found.evaluations:
        add("Evaluations", "evaluations", tables.evaluations(found.evaluations), "± is one standard error, by prompt.")
    if len(found.evaluations) == 2:
        try:
            apart = tables.evaluations_apart(*found.evaluations)
        except UNREADABLE as error:
            notes.append(f"the evaluations' answers.jsonl do not fit together ({type(error).__name__}: {error})")
        else:
            if apart.rows:
                add("What differs between the evaluations", "evaluations_difference", apart)

    read_first = replace_surrogates("\n\n".join(parts))
    sketches: dict[str, tuple[str, Callable[[Path], bool]]] = {
        "curves": ("Curves", lambda path: bool(drawn) and figures.curves(drawn, path)),
        "frontier": ("Reward against KL", lambda path: figures.frontier(groups, path, shown)),
        "verdicts": ("Win, tie, loss", lambda path: figures.verdicts(found.evaluations, drawn, path)),
        "lengths": ("Lengths before and after", lambda path: figures.lengths(drawn, path)),
        "weights": ("Weights", lambda path: figures.weights(drawn, path)),
        "cost": ("Throughput, time and memory", lambda path: bool(drawn) and figures.cost(drawn, path)),
        "variance": ("Variance of the estimators of Z", lambda path: figures.variance(found.tables, path)),
    }
    which = f", the {len(drawn)} of {len(groups)} configurations with the highest reward" if drawn != groups else ""
    for name, (title, draw) in sketches.items():
        path = out / "figures" / f"{name}.{kind}"
        try:
            drawn_there = draw(path)
        except UNREADABLE as error:
            notes.append(
                f"figures/{path.name}: not drawn, as files of its runs do not fit together "
                f"({type(error).__name__}: {error})"
            )
            continue
        if drawn_there:
            parts.append(f"## {title}{which}\n\n![{title}](figures/{path.name})")
    in_order = [run for group in groups for run in group.runs]
    if places := write_pages(in_order[:pages], out / "pages", notes):
        links = "\n".join(f"- [{_line(run.name)}](pages/{quote(path.name)})" for run, path in places)
        of = f"\n\n{len(places)} of {len(found.runs)} runs have a page." if len(places) < len(found.runs) else ""
        parts.append(f"## Pages\n\n{links}{of}")
    if notes:
        parts.append(f"## Left out ({len(notes)})\n\n" + "\n".join(f"- {_line(note)}" for note in notes))
    _write(out / "report.md", "\n\n".join(parts) + "\n")
    return read_first


def write_pages(runs: list[Run], folder: Path, notes: list[str]) -> list[tuple[Run, Path]]:
    """A page a run, by its folder's name; a name that comes again is numbered. notes: which could not be written."""
    places, taken = [], set[str]()
    for run in runs:
        name, number = run.name, 2
        while name in taken:
            name, number = f"{run.name}-{number}", number + 1
        try:
            content = page(run)
        except UNREADABLE as error:
            notes.append(f"{run.folder}: no page, as its files do not fit together ({type(error).__name__}: {error})")
            continue
        taken.add(name)
        places.append((run, folder / f"{name}.html"))
        _write(places[-1][1], content)
    return places


def plot(folders: list[Path], target: Path) -> None:
    """The curves of a run, or of several side by side, whether or not their summaries are written."""
    figures.curves([Group(folder.name.rsplit("-", 1)[0], [Run(folder, {}, {}, {})]) for folder in folders], target)


def _first(table: Table) -> Table:
    return Table(table.columns, table.rows[:ROWS], table.code)


def _line(told: str) -> str:
    """One line of Markdown that is no markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|" else letter for letter in " ".join(told.split()))


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, encoding="utf-8") as file:
        file.write(replace_surrogates(content))
