"""Build tables of runs and evaluations, and write them as Markdown, LaTeX, or CSV with the raw numbers.

A table is a DataFrame of text, numbers and Estimates. Its first column names the rows.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from var.report.groups import Group, find_differing_keys
from var.report.read import EvaluationRecord, RunRecord, is_seed, look_up
from var.utils.statistics import Estimate, estimate_mean

DECIMALS = {  # by the first words of a measure; 3 for all others
    "KL, nats": 2, "length": 1, "tokens/s": 0, "steps": 0, "seconds": 0, "ESS/n": 2, "truncation rate": 2,
    "win rate, %": 1,
}  # fmt: skip
PER_PROMPT = {  # the measures that samples.jsonl has for each prompt: when, and the key of the values
    "reward before": ("before", "rewards"), "reward after": ("after", "rewards"),
    "length before": ("before", "lengths"), "length after": ("after", "lengths"),
}  # fmt: skip
WIDEST = 240  # characters of a Markdown cell; a chat template has thousands
FORMULA = ("=", "+", "-", "@", "\t", "\n")  # what a formula begins with in a spreadsheet, or what hides it
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "λ": r"$\lambda$", "\n": " ",
})  # fmt: skip


def format_cell(cell: Any, *names: str) -> str:
    """Return a cell as text, such as 0.254 ± 0.035. The names of its column and row determine the decimals."""
    if isinstance(cell, Estimate):
        decimals = next((n for name in names for measure, n in DECIMALS.items() if name.startswith(measure)), 3)
        return f"{cell:.{decimals}f}"
    return "–" if pd.isna(cell) else str(cell)


def _format_rows(table: pd.DataFrame, name: Callable[[str], str], cell: Callable[..., str]) -> list[list[str]]:
    rows = table.itertuples(index=False, name=None)
    columns = table.columns[1:]
    return [
        [name(str(row[0])), *(cell(c, column, str(row[0])) for c, column in zip(row[1:], columns, strict=True))]
        for row in rows
    ]


def to_markdown(table: pd.DataFrame, code: bool = True) -> str:
    """Return a Markdown table. With `code`, the names of the rows are typeset as code."""

    def shorten(text: str) -> str:
        text = " ".join(text.split())
        return text if len(text) <= WIDEST else f"{text[:WIDEST]}…"

    def escape(text: str) -> str:
        return escape_markdown(shorten(text), "\\`[]<|")

    def quote(text: str) -> str:
        return f"`{shorten(text).replace('`', chr(39))}`".replace("|", "\\|") if code else escape(text)

    rows = _format_rows(table, quote, lambda *cell: escape(format_cell(*cell)))
    head = [[escape(column) for column in table.columns], ["---", *["---:"] * (len(table.columns) - 1)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def escape_markdown(text: str, characters: str = "\\`*_[]<>|") -> str:
    """Return a text whose HTML, links and images stay text. A page that shows an image contacts the image's server."""
    return "".join(f"\\{character}" if character in characters else character for character in text)


def to_latex(table: pd.DataFrame, code: bool = True) -> str:
    r"""Return a LaTeX table for \usepackage{booktabs}, with all special characters of the data escaped."""

    def quote(text: str) -> str:
        return rf"\texttt{{{text.translate(LATEX)}}}" if code else text.translate(LATEX)

    def escape(cell: Any, *names: str) -> str:
        text = format_cell(cell, *names)
        if isinstance(cell, Estimate):
            return f"${text.replace('±', chr(92) + 'pm')}$"
        return "--" if pd.isna(cell) else text.translate(LATEX)

    columns = [column.translate(LATEX) for column in table.columns]
    styler = pd.DataFrame(_format_rows(table, quote, escape), columns=columns, dtype=object).style.hide(axis="index")
    return str(styler.to_latex(hrules=True, column_format="l" + "r" * (len(columns) - 1)))


def to_csv(table: pd.DataFrame) -> str:
    """Return the unrounded numbers as CSV. The standard errors of a column follow it in a column of their own.

    Text that a spreadsheet would take for a formula begins with an apostrophe.
    """

    def show(cell: Any) -> Any:
        if isinstance(cell, Estimate):
            return cell.mean
        if isinstance(cell, str):
            cell = cell.replace("\r", " ")  # which the writer would not quote
            return f"'{cell}" if cell.startswith(FORMULA) else cell
        return cell

    columns = []
    for name, cells in ((show(name), cells) for name, cells in table.items()):
        means = [show(cell) for cell in cells]
        errors = [cell.se if isinstance(cell, Estimate) else None for cell in cells]
        columns.append(pd.Series(means, name=name, dtype=object))
        if any(error is not None for error in errors):
            columns.append(pd.Series(errors, name=f"{name}, se", dtype=object))
    return str(pd.concat(columns, axis=1).to_csv(index=False, lineterminator="\n"))


def tabulate_groups(groups: list[Group]) -> pd.DataFrame:
    """Return one row per configuration. A result that no run has is not a column."""
    seeds = any(len(group.runs) > 1 for group in groups)
    rows = [{"configuration": g.label, **({"seeds": len(g.runs)} if seeds else {}), **g.measures} for g in groups]
    return pd.DataFrame(rows, dtype=object)


def tabulate_runs(runs: list[RunRecord]) -> pd.DataFrame:
    """Return one row per run: folder, title, hashes, commit, the settings in which runs differ, and the results."""
    keys = find_differing_keys([run.settings for run in runs])
    rows: list[list[Any]] = []
    for run in runs:
        hashes = run.summary.get("hashes") or {}
        settings = [None if (value := run.settings.get(key)) is None else str(value) for key in keys]
        facts = [run.summary["title"], hashes.get("plan"), hashes.get("weights"), run.summary.get("commit")]
        rows.append([str(run.folder), *facts, *settings])
    columns = ["folder", "title", "plan", "weights", "commit", *keys]
    measures = pd.DataFrame([run.measures for run in runs], dtype=object)
    return pd.concat([pd.DataFrame(rows, columns=columns, dtype=object), measures], axis=1)


def tabulate_evaluations(evaluations: list[EvaluationRecord]) -> pd.DataFrame:
    """Return one row per subset of each evaluation and per average over subsets. Errors are clustered by prompt."""
    rows = [{"evaluation": e.title, "subset": part, **found} for e in evaluations for part, found in e.parts.items()]
    return pd.DataFrame(rows, dtype=object)


def compare_evaluations(first: EvaluationRecord, second: EvaluationRecord) -> pd.DataFrame:
    """Return the rewards of two evaluations and second − first by subset, paired over the prompts of both.

    Only rewards with equal fingerprints in both evaluations are compared.
    """
    rows = []
    for name in [name for name, fingerprint in first.rewards.items() if second.rewards.get(name) == fingerprint]:
        sides = [side.by_prompt(name) for side in (first, second)]
        for subset in dict.fromkeys(subset for subset, _ in sides[0]):
            common = [key for key in sides[0] if key[0] == subset and key in sides[1]]
            if len(common) > 1:
                values = [np.array([side[key] for key in common]) for side in sides]
                rows.append([f"{name}, {subset}", *map(estimate_mean, (*values, values[1] - values[0])), len(common)])
    columns = ["", first.title, second.title, "difference, paired", "prompts"]
    return pd.DataFrame(rows, columns=columns, dtype=object)


def compare_settings(groups: list[Group]) -> pd.DataFrame:
    """Return the keys in which configurations differ, without seeds, and their values in each configuration."""

    def show(settings: dict[str, Any], key: str) -> str | None:
        if key not in settings or isinstance(settings[key], str):
            return settings.get(key)
        return json.dumps(settings[key], ensure_ascii=False)

    first = [group.runs[0].settings for group in groups]
    rows = [[key, *(show(s, key) for s in first)] for key in find_differing_keys(first) if not is_seed(key)]
    return pd.DataFrame(rows, columns=["key", *(group.label for group in groups)], dtype=object)


def compare_groups(first: Group, second: Group) -> pd.DataFrame:
    """Return the results of two configurations, and second − first with its standard error.

    Differences are paired by prompt if each configuration is one run and both answered the same prompts. They are
    paired by seed if each configuration has several runs with the same seeds. Otherwise draws are independent.
    """
    difference: Estimate | None
    same_reward = _reward_settings(first.runs[0]) == _reward_settings(second.runs[0])
    rows: list[list[Any]] = []
    for name in [name for name in first.measures if name in second.measures]:
        if not same_reward and ("reward" in (words := name.split()) or words[0] in ("gain,", "win")):
            difference, pairing = None, "rewards differ"
        else:
            difference, pairing = _subtract(first, second, name)
        rows.append([name, first.measures[name], second.measures[name], difference, pairing])
    return pd.DataFrame(rows, columns=["", first.label, second.label, "difference", "pairing"], dtype=object)


def _reward_settings(run: RunRecord) -> dict[str, Any]:
    """Return the settings that define the unit of rewards, and the moments of z-scores, which are a run's own.

    The loss's λ and the like are not among them.
    """
    found = {k: v for k, v in run.settings.items() if k.startswith(("reward", "eval.reward"))}
    if found.get("reward_scale") == "zscore" and not any(key.startswith("eval.reward.") for key in found):
        found["scale"] = look_up(run.summary, "data.reward.scale")
    return found


def _subtract(first: Group, second: Group, name: str) -> tuple[Estimate, str]:
    """Return second − first of a result, and how its standard error was computed."""
    if len(first.runs) == len(second.runs) == 1:
        unit, a, b = "prompts", _by_prompt(first.runs[0], name), _by_prompt(second.runs[0], name)
    else:
        unit, a, b = "seeds", _by_seed(first, name), _by_seed(second, name)
    if len(a) > 1 and a.keys() == b.keys():
        return estimate_mean(np.array([b[key] - value for key, value in a.items()])), f"paired by {len(a)} {unit}"
    one, other = first.measures[name], second.measures[name]
    if one.se is None or other.se is None:
        return Estimate(other.mean - one.mean), "no standard error"
    return Estimate(other.mean - one.mean, math.hypot(one.se, other.se)), "unpaired"


def _by_seed(group: Group, name: str) -> dict[str, float]:
    return {run.seeds: run.measures[name].mean for run in group.runs if name in run.measures}


def _by_prompt(run: RunRecord, name: str) -> dict[str, float]:
    """Return the mean of a result over the answers to each prompt; empty if samples.jsonl does not have it."""

    def average(record: Mapping[str, Any], name: str) -> float:
        when, key = PER_PROMPT[name]
        return float(np.mean(record[when][key]))

    def measure(record: Mapping[str, Any]) -> float:
        if name == "gain, paired":
            return average(record, "reward after") - average(record, "reward before")
        return average(record, name)

    try:
        return {json.dumps(record["prompt"], sort_keys=True): measure(record) for record in run.samples}
    except (KeyError, TypeError, ValueError):
        return {}
