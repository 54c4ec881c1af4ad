"""How a table or a figure of arXiv 2502.11026 is declared: rows, columns, and the commands that fill them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from var.utils.statistics import estimate_mean


@dataclass(frozen=True)
class Command:
    """A program and its arguments.

    In its words, `{seed}` is the seed, `{own}` the command's own folder, `{run}` the folder of the row's training run,
    and `{<label of a row>}` that of another row's, which runs first. A word with `{run}` is left out if the row is not
    trained.
    """

    program: tuple[str, ...]
    """Arguments of Python."""
    words: tuple[str, ...]
    """Arguments of the program."""
    result: str
    """Where its result is, below its own folder; may contain *."""


def train(*words: str) -> Command:
    """Return a training run."""
    return Command(("train.py",), (*words, "seed={seed}", "runs={own}/runs"), "runs/*/summary.json")


def evaluate(*words: str) -> Command:
    """Return an evaluation of the row's model."""
    return Command(("eval.py",), ("init={run}", *words, "out={own}/evals"), "evals/*/result.json")


def sample(*words: str) -> Command:
    """Return responses that are sampled from the row's model."""
    return Command(("sample.py",), ("init={run}", *words, "out={own}/responses.jsonl"), "responses.jsonl")


def study(part: str) -> Command:
    """Return a study on the exact testbed."""
    return Command(("-m", "experiments.tabular"), ("{own}", "--only", part), "tables.json")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model, or an estimator: what is run for it once per seed."""

    label: str
    stages: Mapping[str, Command] = field(default_factory=dict)
    """The commands by name. `train` is the training run; the others follow it."""
    group: str = ""
    """What is before the label in the table, as the name of a model."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Which records of a result belong to the row, for a result with records of all rows."""
    shown: bool = True
    """Whether the row is in the table. Others only run because rows continue them."""
    once: bool = False
    """Whether only the first seed runs and serves all seeds."""

    @property
    def name(self) -> str:
        """The group and the label."""
        return f"{self.group}, {self.label}" if self.group else self.label


Read = Callable[[Path, Row], Any]
"""Read a cell from a result file: a number, a number with its standard error, a text, or None if it does not apply."""
Pool = Callable[..., tuple[float, float | None] | None]
"""Compute a number and its standard error from the result files of all seeds, the row, and the result files of the
column's command `second_stage` if it has one; None if the number does not apply.
"""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A quantity of each row."""

    title: str
    read: Read | None = None
    pool: Pool | None = None
    """In place of `read`, if the number is not a mean over seeds."""
    stage: str = "train"
    """The command whose result is read."""
    second_stage: str = ""
    """Another command, whose results `pool` receives too."""
    digits: int = 3
    ratio_to: str | None = None
    """The label of a row. The quantity is divided by that row's at the same seed."""
    panel: str | None = None
    """The vertical axis of the panel of the figure that shows the column; None: it is not shown."""
    x: float | str | None = None
    """Where the column is on the panel's horizontal axis: a number, or the title of the column that has it for each
    row. Columns without it are groups of bars.
    """
    shown: bool = True
    """Whether the column is in the table. Others are for the figure."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows by columns."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    title: str = ""
    """What distinguishes it from the item's other tables."""
    seeds: tuple[int, ...] = (0,)
    timed: str = ""
    """The command whose seconds are compared. It has its own annotation cache, and the item runs one job at a time."""
    stored: bool = False
    """Whether an archive keeps the results of its runs. Their models, which nothing continues, are then removed."""
    errors: str = ""
    """Over what the standard errors are; "": over seeds, or with one seed over prompts."""
    x_label: str = ""
    """The horizontal axis of the figure's panels."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A table, a figure, or an argument of the paper."""

    title: str
    sizes: Mapping[str, tuple[Table, ...]]
    """Its tables at size=small and size=paper."""


def add_words(commands: Mapping[str, Command], *words: str) -> dict[str, Command]:
    """Return commands with further words before the last one, which is their folder."""
    return {
        name: replace(command, words=(*command.words[:-1], *words, command.words[-1]))
        for name, command in commands.items()
    }


def select(rows: tuple[Row, ...], *labels: str) -> tuple[Row, ...]:
    """Return each model's rows with these labels, and hidden after them the others, which they may continue."""
    groups = dict.fromkeys(row.group for row in rows)
    shown = [row for group in groups for label in labels for row in rows if (row.group, row.label) == (group, label)]
    return (*shown, *(replace(row, shown=False) for row in rows if row.label not in labels))


def evaluate_rows(rows: tuple[Row, ...], **evaluations: Command) -> tuple[Row, ...]:
    """Return the rows with these evaluations in place of theirs."""
    trained = [{name: command for name, command in row.stages.items() if name == "train"} for row in rows]
    return tuple(replace(row, stages={**own, **evaluations}) for row, own in zip(rows, trained, strict=True))


def summary(keys: str, scale: float = 1.0) -> Read:
    """Read a number of a JSON file by its keys, joined by dots. An estimate has a mean and a standard error."""

    def read(path: Path, row: Row) -> Any:
        value: Any = json.loads(path.read_text())
        for key in keys.split("."):
            value = value[key]
        if not isinstance(value, dict):
            return value if value is None or isinstance(value, str) else scale * value
        error = value.get("se", value.get("se_prompts"))
        return scale * value["mean"], None if error is None else scale * error

    return read


def metric(name: str, step: int) -> Read:
    """Read a metric of a run after an optimizer step, with its standard error."""

    def read(path: Path, row: Row) -> Any:
        import pandas

        lines = pandas.read_csv(path.parent / "metrics.csv")
        lines = lines[(lines["step"] == step) & lines[name].notna()]
        if lines.empty:
            return None
        error = lines.iloc[-1].get(f"{name}_se")
        return float(lines.iloc[-1][name]), None if error is None else float(error)

    return read


def record(part: str, value: str, **where: Any) -> Read:
    """Read the mean over the records of a study that have these settings and the row's, and its standard error."""

    def read(path: Path, row: Row) -> Any:
        settings = {**row.where, **where}
        found = [
            entry[value]
            for entry in json.loads(path.read_text())[part]
            if all(entry.get(key) == setting for key, setting in settings.items())
        ]
        if not found:
            raise KeyError(f"{part} with {settings}")
        if isinstance(found[0], str) or len(found) == 1:
            return found[0]
        over_records = estimate_mean(np.array(found))
        return over_records.mean, over_records.se

    return read
