"""The cells of tables: read from results, written to results-<size>.json, and shown as tables and figures."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.items.base import Column, Item, Row, Table
from experiments.jobs import ROOT, Job
from var.utils.files import atomic
from var.utils.statistics import estimate_mean

PAPER = ROOT / "experiments" / "paper.yaml"
PAPER_MARK = "arXiv 2502.11026"
UNREADABLE = (LookupError, TypeError, ValueError, ArithmeticError, OSError)  # what reading a result may raise


@dataclass
class Cell:
    """A number or a text of a table, with everything that it depends on."""

    table: str
    row: str
    column: str
    value: float | str | None = None
    se: float | None = None
    """Standard error: over seeds if there are several, else over prompts."""
    n: int = 0
    """Runs."""
    seeds: list[int] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    """The folders of training runs and evaluations, which are named after hashes of their configurations."""
    commands: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """How long these commands took in all."""
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    """Why a run failed."""


def fill(
    table: Table,
    row: Row,
    column: Column,
    jobs: Mapping[tuple[str, int], Job],
    seeds: Sequence[int],
    failed: str,
    others: Sequence[Job] = (),
) -> Cell:
    """Return a cell, from the finished jobs of its column's stage by the row's name and the seed.

    others: the jobs of the column's second command.
    """
    cell = Cell(table.title, row.name, column.title, failed=failed)
    found, paths = list[tuple[Any, float | None]](), list[Path]()
    for seed in seeds:
        job = jobs.get((row.name, seed))
        if job is None or (result := job.result) is None:
            continue
        paths.append(result)
        try:
            number = _read(column, result, row)
            if column.ratio_to is not None and number is not None:
                base = next(other for other in table.rows if column.ratio_to in (other.label, other.name))
                divisor = jobs[base.name, seed].result
                below = None if divisor is None else _read(column, divisor, base)
                number = None if below is None else (number[0] / below[0], None)
            if number is not None:
                found.append(number)
        except UNREADABLE as error:
            cell.failed = cell.failed or f"{column.title} cannot be read ({type(error).__name__}: {error})"
            continue
        cell.seeds.append(seed)
        _describe(cell, job)
    if column.pool is not None and paths and not cell.failed:
        try:
            pooled = column.pool(paths, row, *([[job.result for job in others]] if others else []))
        except UNREADABLE as error:
            cell.failed = f"{column.title} cannot be read ({type(error).__name__}: {error})"
        else:
            if pooled is not None:
                cell.n, (cell.value, cell.se) = len(paths), pooled
                for other in others:
                    _describe(cell, other)
    elif found and not cell.failed:
        values, cell.n = [value for value, _ in found], len(found)
        if isinstance(values[0], str):
            cell.value = values[0]
        else:
            over_seeds = estimate_mean(np.array(values))
            cell.value = "∞" if over_seeds.mean == np.inf else over_seeds.mean  # JSON has no infinity
            cell.se = over_seeds.se if len(found) > 1 else found[0][1]
    return cell


def _read(column: Column, result: Path, row: Row) -> tuple[Any, float | None] | None:
    number = None if column.read is None else column.read(result, row)
    number = number if isinstance(number, tuple) else (number, None)
    return None if number[0] is None else number


def _describe(cell: Cell, job: Job) -> None:
    """Add the commands of a job and of those that it needs."""
    for one in job.in_order():
        command = shlex.join(one.portable)
        if command in cell.commands:
            continue
        cell.commands.append(command)
        cell.seconds = round(cell.seconds + one.seconds, 1)
        assert one.result is not None
        cell.runs.append(one.result.parent.name if "*" in one.command.result else one.folder.name)
        if one.result.suffix == ".json" and isinstance(content := json.loads(one.result.read_text()), dict):
            content = content.get("depends_on", content)
            cell.commit = content.get("commit", cell.commit)
            cell.versions = content.get("versions", cell.versions)


def write_table(table: Table, cells: Sequence[Cell], size: str) -> str:
    """Return a table in Markdown, and below it how many seeds it has, what failed, and what the paper leaves open.

    Rows without cells have not run, and are named below it.
    """
    ran, known = {cell.row for cell in cells}, {(cell.row, cell.column): cell for cell in cells}
    rows = [row for row in table.rows if row.shown and row.name in ran]
    missing = [row.name for row in table.rows if row.shown and row.name not in ran]
    if not rows:
        return "Not run yet."
    names = (["model"] if any(row.group for row in rows) else []) + ["method"]
    columns = [column for column in table.columns if column.shown]
    lines = [f"| {' | '.join([*names, *(column.title for column in columns)])} |"]
    lines.append("|" + " --- |" * (len(names) + len(columns)))
    for row in rows:
        shown = [show(known.get((row.name, column.title)), column) for column in columns]
        lines.append(f"| {' | '.join([*([row.group] if len(names) > 1 else []), row.label, *shown])} |")
    lines += ["", f"Not run yet: {'; '.join(missing)}."] if missing else []
    return "\n".join([*lines, "", *_notes(table, cells, size)])


def _notes(table: Table, cells: Sequence[Cell], size: str) -> Iterator[str]:
    counts = {cell.n for cell in cells if cell.n}
    errors = any(cell.se is not None for cell in cells)
    if table.errors:
        yield table.errors
    elif counts and (errors or max(counts) > 1):
        several = "1 seed" if counts == {1} else f"{max(counts)} seeds"
        over = "over seeds" if max(counts) > 1 else "over prompts"
        yield f"{several}{f'; errors are {over}' if errors else ''}."
    shown = [command for row in table.rows if row.shown for command in row.stages.values()]
    words = [word for command in shown for word in command.words]
    groups = ("experiment", "loss") if size == "paper" else ("loss",)  # a small experiment has settings of its own
    if assumed := list_assumptions(words, groups):
        yield ""
        yield f"Assumptions where the paper leaves it open: {'; '.join(assumed)}."
    for failure in dict.fromkeys(f"- {cell.row} failed. {cell.failed}" for cell in cells if cell.failed):
        yield ""
        yield failure


def write_paper_table(name: str) -> str | None:
    """Return the table of the paper in Markdown, or None if the paper gives no numbers."""
    known = yaml.safe_load(PAPER.read_text())
    if name not in known:
        return None
    table = known[name]
    keys = {len(row.split(", ")) for row in table["rows"]}
    names = ["model", "method"][-max(keys) :]
    lines = [f"| {' | '.join([*names, *table['columns']])} |", "|" + " --- |" * (len(names) + len(table["columns"]))]
    lines += [f"| {' | '.join([*row.split(', '), *cells])} |" for row, cells in table["rows"].items()]
    return "\n".join([*lines, "", f"arXiv 2502.11026, {table['source']}."])


def show(cell: Cell | None, column: Column) -> str:
    """Return a cell as text."""
    if cell is None or cell.value is None or cell.failed:
        return "failed" if cell is not None and cell.failed else "–"
    if isinstance(cell.value, str):
        return " ".join(cell.value.split()).replace("|", "\\|")
    text = f"{round(cell.value, column.digits) or 0.0:.{column.digits}f}"  # 0.0 has no sign
    return (text if cell.se is None else f"{text} ± {cell.se:.{column.digits}f}").replace("-", "−")


def list_assumptions(words: Sequence[str], groups: Sequence[str] = ("experiment", "loss")) -> list[str]:
    """Return what the paper leaves open, from `# assumption:` in the files of these groups that overrides select."""
    found, files = list[str](), list[Path]()

    def read(group: str, name: str) -> None:
        path = ROOT / "conf" / group / f"{name}.yaml"
        if not path.exists() or path in files:
            return
        files.append(path)
        for default in yaml.safe_load(path.read_text()).get("defaults", []):
            if isinstance(default, str) and default != "_self_":
                read(group, default)
            elif isinstance(default, dict):
                for place, chosen in default.items():
                    if place.split("/")[-1] == "loss":
                        read("loss", chosen)
        found.extend(re.findall(r"# assumption: (.*)", path.read_text()))

    for word in words:
        group, _, names = word.partition("=")
        if group in groups:
            for name in names.strip("[]").split(","):
                read(group, name)
    return found


def insert(text: str, mark: str, content: str) -> str:
    """Return the text of a README with the content between its two marks. Raise ValueError if it lacks the second."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    if begin not in text:
        return text
    before, _, rest = text.partition(begin)
    if end not in rest:
        raise ValueError(f"{begin} is not followed by {end}, so the text after it would be lost")
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def write_item(name: str, item: Item, size: str, cells: Sequence[Cell]) -> str:
    """Return all tables of an item at one size in Markdown, each below its title, and the figure if there is one."""
    parts = []
    for table in item.sizes[size]:
        own = [cell for cell in cells if cell.table == table.title]
        parts.append((f"**{table.title}**\n\n" if table.title else "") + write_table(table, own, size))
        if own and any(column.panel for column in table.columns):
            parts.append(f"![{item.title}]({name_figure(name, item, size, table)})")
    return "\n\n".join(parts)


def name_figure(name: str, item: Item, size: str, table: Table) -> str:
    """Return the file name of a table's figure."""
    index = item.sizes[size].index(table)
    return f"{name}-{size}{f'-{index + 1}' if index else ''}.png"


def draw(table: Table, cells: Sequence[Cell], path: Path) -> None:
    """Draw the columns that have a panel: lines if they have places on the horizontal axis, else groups of bars."""
    panels = list(dict.fromkeys(column.panel for column in table.columns if column.panel))
    with figure(path, len(panels)) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            ran = {cell.row for cell in cells}
            draw_panel(axis, table, cells, panel, [row for row in table.rows if row.shown and row.name in ran])


@contextmanager
def figure(path: Path, panels: int) -> Iterator[Sequence[Any]]:
    """Yield the axes of a figure's panels, and write it with a legend at its right, of the panel that has most rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(4.8 * panels + 1.8, 3.8), layout="constrained", squeeze=False)
    try:
        yield axes[0]
        drawn = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1]))
        figure.legend(*drawn, loc="outside right upper", fontsize="x-small")
        figure.savefig(path, dpi=120, metadata={"Software": None})
    finally:
        plt.close(figure)


def draw_panel(
    axis: Any, table: Table, cells: Sequence[Cell], panel: str, rows: Sequence[Row], colors: Mapping[str, str] = {}
) -> None:
    """Draw the columns of a panel for these rows of a table. Limits, which are not trained, are dashed.

    colors: of rows by name; the others follow each other.
    """
    known = {(cell.row, cell.column): cell for cell in cells if isinstance(cell.value, float | int) and not cell.failed}
    columns = [column for column in table.columns if column.panel == panel]
    for i, row in enumerate(rows):
        found = [
            (column, known[row.name, column.title])
            for column in columns
            if (row.name, column.title) in known and (not isinstance(column.x, str) or (row.name, column.x) in known)
        ]
        values = [cell.value for _, cell in found]
        errors = [cell.se or 0.0 for _, cell in found]
        if columns[0].x is not None:
            places = [known.get((row.name, str(column.x))) for column, _ in found]
            across = [column.x if at is None else at.value for (column, _), at in zip(found, places, strict=True)]
            spread = [(at and at.se) or 0.0 for at in places]
            axis.errorbar(
                across, values, errors, spread, marker="o", markersize=4, elinewidth=0.5, label=row.name,
                color=colors.get(row.name, name_color(i)), linestyle="--" if "path" in row.where else "-",
            )  # fmt: skip
        else:
            width = 0.8 / len(rows)
            places = [columns.index(column) + (i - (len(rows) - 1) / 2) * width for column, _ in found]
            axis.bar(places, values, width, yerr=errors, label=row.name, capsize=2)
    if columns[0].x is None:
        axis.set_xticks(range(len(columns)), [column.title for column in columns], fontsize="small")
    else:
        axis.set_xlabel(table.x_label)
    axis.set_ylabel(panel)


def name_color(index: int) -> tuple[float, ...]:
    """Return one of twenty different colors, the ten strong ones first."""
    import matplotlib

    color: tuple[float, ...] = matplotlib.colormaps["tab20"].colors[(2 * index + index // 10) % 20]  # type: ignore[attr-defined]
    return color


def publish(name: str, item: Item, size: str, cells: Sequence[Cell], out: Path) -> None:
    """Write results-<size>.json, draw the figures, and put the tables into README.md, in the item's folder of `out`."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    records = [asdict(cell) for cell in cells]
    with atomic(folder / f"results-{size}.json") as file:
        file.write(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    for table in item.sizes[size]:
        own = [cell for cell in cells if cell.table == table.title]
        if own and any(column.panel for column in table.columns):
            draw(table, own, folder / name_figure(name, item, size, table))
    readme, text = folder / "README.md", write_item(name, item, size, cells)
    paper = write_paper_table(name)
    if readme.exists():
        before = readme.read_text()
        if f"<!-- {name} {size} -->" not in before:
            print(f"{readme} has no mark <!-- {name} {size} -->, so the tables are not in it")
        after = insert(insert(before, f"{name} {size}", text), PAPER_MARK, paper or "")
        with atomic(readme) as file:
            file.write(after)
    print(f"\n{item.title}\n\n{text}\n" + (f"\nThe paper's:\n\n{paper}\n" if paper else ""))


def read_results(folder: Path) -> Iterator[tuple[str, list[Cell]]]:
    """Yield (size, cells) for the results in an item's folder."""
    for path in sorted(folder.glob("results-*.json")):
        yield path.stem.removeprefix("results-"), [Cell(**record) for record in json.loads(path.read_text())]
