"""Tables of runs and evaluations, in Markdown for reading, LaTeX for a paper, CSV with the raw numbers."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from var.report.read import Estimate, Evaluation, Group, Run, differing, is_seed, over

Cell = str | int | Estimate | None

DIGITS = {
    "KL, nats": 2, "length": 1, "tokens/s": 0, "steps": 0, "s of": 0, "ESS/n": 2, "truncation rate": 2,
    "win rate, %": 1,
}  # fmt: skip
WIDEST = 240  # letters of a cell of Markdown; a chat template has thousands
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "λ": r"$\lambda$", "\n": " ",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The first column names a row; `code`: in the words of a command line."""

    columns: list[str]
    rows: list[list[Cell]]
    code: bool = True

    def markdown(self) -> str:
        def one_line(text: str) -> str:
            text = " ".join(text.split())
            return (text if len(text) <= WIDEST else f"{text[:WIDEST]}…").replace("|", "\\|")

        def told(text: str) -> str:
            return one_line(text).replace("<", "\\<")  # no tag

        def name(text: str) -> str:
            return f"`{one_line(text).replace('`', chr(39))}`" if self.code else told(text)

        lines = [
            [name(str(row[0])), *(told(plain(cell, measure)) for cell, measure in self._rest(row))] for row in self.rows
        ]
        head = [[told(column) for column in self.columns], ["---", *["---:"] * (len(self.columns) - 1)]]
        return "\n".join("| " + " | ".join(line) + " |" for line in [*head, *lines])

    def latex(self) -> str:
        r"""With \usepackage{booktabs}; of texts, all that LaTeX reads as a command is escaped."""

        def number(cell: Cell, measure: str) -> str:
            if cell is None:
                return "--"
            text = plain(cell, measure)
            return f"${text.replace('±', chr(92) + 'pm')}$" if isinstance(cell, Estimate) else escaped(text)

        lines = [
            [rf"\texttt{{{escaped(str(row[0]))}}}" if self.code else escaped(str(row[0]))]
            + [number(cell, measure) for cell, measure in self._rest(row)]
            for row in self.rows
        ]
        body = "\n".join(" & ".join(line) + r" \\" for line in lines)
        head = " & ".join(map(escaped, self.columns)) + r" \\"
        kinds = "l" + "r" * (len(self.columns) - 1)
        return f"\\begin{{tabular}}{{{kinds}}}\n\\toprule\n{head}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"

    def csv(self) -> str:
        """Numbers as they are; an estimate's standard error stands in a column beside it."""
        errors = {i for i in range(len(self.columns)) if any(_error(row[i]) is not None for row in self.rows)}
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            [name for i, c in enumerate(self.columns) for name in ((c, f"{c}, se") if i in errors else (c,))]
        )
        for row in self.rows:
            line: list[Any] = []
            for i, cell in enumerate(row):
                line.append(cell.mean if isinstance(cell, Estimate) else cell)
                line += [_error(cell)] if i in errors else []
            writer.writerow(line)
        return out.getvalue()

    def _rest(self, row: list[Cell]) -> list[tuple[Cell, str]]:
        """The cells after the first, and what each measures: its column says so, or else the row's name."""
        return [
            (cell, column if digits(column) is not None else str(row[0]))
            for cell, column in zip(row[1:], self.columns[1:], strict=True)
        ]


def _error(cell: Cell) -> float | None:
    return cell.se if isinstance(cell, Estimate) else None


def digits(measure: str) -> int | None:
    """Decimals that a measure is told with, where they are not three."""
    return next((count for name, count in DIGITS.items() if measure.startswith(name)), None)


def plain(cell: Cell, measure: str = "") -> str:
    """A cell as it is read: 0.254 ± 0.035."""
    if cell is None:
        return "–"
    if not isinstance(cell, Estimate):
        return str(cell)
    count = 3 if (told := digits(measure)) is None else told
    return f"{cell.mean:.{count}f}" + ("" if cell.se is None else f" ± {cell.se:.{count}f}")


def escaped(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def configurations(groups: list[Group]) -> Table:
    """A row a configuration; of what none has measured there is no column."""
    several = max((len(group.runs) for group in groups), default=1) > 1
    names = list(dict.fromkeys(name for group in groups for name in group.measures))
    columns = ["configuration", *(["seeds"] if several else []), *names]
    rows: list[list[Cell]] = [
        [group.label, *([len(group.runs)] if several else []), *(group.measures.get(name) for name in names)]
        for group in groups
    ]
    return Table(columns, rows)


def every_run(runs: list[Run]) -> Table:
    """A row a run: what came out, the keys in which runs differ, and what makes it the run that it is."""
    names = list(dict.fromkeys(name for run in runs for name in run.measures))
    keys = differing([run.settings for run in runs])
    rows: list[list[Cell]] = []
    for run in runs:
        hashes = run.summary.get("hashes") or {}
        facts = [run.summary["title"], *(hashes.get(key) for key in ("plan", "weights")), run.summary.get("commit")]
        values = [None if (value := run.settings.get(key)) is None else str(value) for key in keys]
        rows.append([str(run.folder), *facts, *values, *(run.measures.get(name) for name in names)])
    return Table(["folder", "title", "plan", "weights", "commit", *keys, *names], rows)


def evaluations(several: list[Evaluation]) -> Table:
    """A row a subset of each evaluation, and one an average over subsets; errors by prompt."""
    names = list(dict.fromkeys(name for one in several for part in one.parts.values() for name in part))
    rows: list[list[Cell]] = [
        [str(one.result.get("title", one.folder.name)), part, *(found.get(name) for name in names)]
        for one in several
        for part, found in one.parts.items()
    ]
    return Table(["evaluation", "subset", *names], rows, code=False)


def evaluations_apart(one: Evaluation, other: Evaluation) -> Table:
    """Of two evaluations the second's rewards less the first's, by subset, paired by prompt over the prompts of both.

    A reward is compared where both gave it under one identity.
    """
    rewards = [name for name, identity in one.rewards.items() if other.rewards.get(name) == identity]
    rows: list[list[Cell]] = []
    for name in rewards:
        here, there = one.by_prompt(name), other.by_prompt(name)
        for subset in dict.fromkeys(subset for subset, _ in here):
            both = [key for key in here if key[0] == subset and key in there]
            if len(both) > 1:
                sides = [over([side[key] for key in both]) for side in (here, there)]
                difference = over([there[key] - here[key] for key in both])
                rows.append([f"{name}, {subset}", *sides, difference, len(both)])
    titles = [str(side.result.get("title", side.folder.name)) for side in (one, other)]
    return Table(["", *titles, "difference, paired", "prompts"], rows, code=False)


def settings_apart(groups: list[Group]) -> Table:
    """The keys in which configurations differ, seeds aside, and their values in each."""
    first = [group.runs[0].settings for group in groups]
    keys = [key for key in differing(first) if not is_seed(key)]
    rows: list[list[Cell]] = [[key, *(_shown(settings, key) for settings in first)] for key in keys]
    return Table(["key", *(group.label for group in groups)], rows)


def _shown(settings: dict[str, Any], key: str) -> Cell:
    if key not in settings:
        return None
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def outcomes_apart(one: Group, other: Group) -> Table:
    """What came out of two configurations, and the second's less the first's with its standard error.

    Paired by prompt, where each is one run and both answered the same prompts; by seed, where each has several and
    the seeds are the same; otherwise as of independent draws.
    """
    rows: list[list[Cell]] = []
    for name in [name for name in one.measures if name in other.measures]:
        if "reward" in (words := name.split()) or words[0] in ("gain,", "win"):
            here, there = (_reward(group.runs[0]) for group in (one, other))
            if here != there:
                rows.append([name, one.measures[name], other.measures[name], None, "rewards differ"])
                continue
        difference, how = _difference(one, other, name)
        rows.append([name, one.measures[name], other.measures[name], difference, how])
    return Table(["", one.label, other.label, "difference", "its error"], rows, code=False)


def _reward(run: Run) -> dict[str, Any]:
    """What the numbers called rewards are in; its λ and the like are the loss's."""
    return {k: v for k, v in run.settings.items() if k.startswith(("reward", "eval.reward"))}


def _difference(one: Group, other: Group, name: str) -> tuple[Estimate, str]:
    a, b = one.measures[name], other.measures[name]
    if len(one.runs) == len(other.runs) == 1:
        if (paired := _by_prompt(one.runs[0], other.runs[0], name)) is not None:
            return over(list(paired)), f"paired by {len(paired)} prompts"
    else:
        seeds = [{run.seeds: run.measures[name].mean for run in g.runs if name in run.measures} for g in (one, other)]
        if seeds[0].keys() == seeds[1].keys() and len(seeds[0]) > 1:
            return over(
                [seeds[1][seed] - value for seed, value in seeds[0].items()]
            ), f"paired by {len(seeds[0])} seeds"
    if a.se is None or b.se is None:
        return Estimate(b.mean - a.mean), "not known"
    return Estimate(b.mean - a.mean, math.hypot(a.se, b.se)), "unpaired"


PER_PROMPT: dict[str, Callable[[dict[str, Any]], float]] = {
    "reward before": lambda record: np.mean(record["before"]["rewards"]),
    "reward after": lambda record: np.mean(record["after"]["rewards"]),
    "gain, paired": lambda record: np.mean(record["after"]["rewards"]) - np.mean(record["before"]["rewards"]),
    "length before": lambda record: np.mean(record["before"]["lengths"]),
    "length after": lambda record: np.mean(record["after"]["lengths"]),
}  # type: ignore[assignment]


def _by_prompt(one: Run, other: Run, name: str) -> np.ndarray | None:
    """[P] differences by prompt; None where the prompts are not the same or there is no number a prompt."""
    if name not in PER_PROMPT:
        return None
    values = []
    for run in (one, other):
        try:
            values.append({json.dumps(r["prompt"], sort_keys=True): float(PER_PROMPT[name](r)) for r in run.samples})
        except (KeyError, TypeError, ValueError):
            return None
    if values[0].keys() != values[1].keys() or len(values[0]) < 2:
        return None
    return np.array([values[1][prompt] - value for prompt, value in values[0].items()])
