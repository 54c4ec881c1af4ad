"""Render the HTML page of a run from page.html.jinja. The page is one file without scripts or external requests.

Jinja2 escapes all text, so markup in data, configurations and answers is shown as text.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from var.report.conclusion import conclude
from var.report.figures import JUDGE_WIN_RATE, PANELS, PEAK_MEMORY
from var.report.read import RunRecord
from var.report.tables import format_cell
from var.report.warnings import validation_warnings

SHOWN_PROMPTS, OPEN_PROMPTS = 100, 6  # prompts on the page, and those that are visible without a click
SHOWN_MICRO_BATCHES = 4
LOG_LINE = re.compile(r"\[[^]]*\]\[(?P<logger>[^]]*)\]\[(?:WARNING|ERROR)\] - (?P<text>.+)")  # as Hydra logs
NUMBER = re.compile(r"-?[\d.]+( ± [\d.]+)?")
LEFT, RIGHT, TOP, BOTTOM = 48, 310, 15, 140  # the axes of a chart, in a drawing of 320 by 170
WEIGHT_LABELS = {
    "ess": "effective sample size, over the responses",
    "largest": "largest weight over the mean",
    "tiny": "fraction under a thousandth of the mean",
    "length_correlation": "correlation with response length",
}


@dataclass(frozen=True)
class Chart:
    """The coordinates of a chart: curves over optimizer steps, or a histogram."""

    label: str
    levels: Sequence[tuple[float, float]]  # the labeled values of the vertical axis and their places
    ends: tuple[str, str]  # the labels at the ends of the horizontal axis
    lines: Sequence[Sequence[tuple[float, float]]] = ()  # a curve, and a second one that is dashed
    errors: Sequence[tuple[float, float, float]] = ()  # x and both ends of each error bar
    bars: Sequence[tuple[float, float, float, float]] = ()  # x, y, width and height


def render_page(run: RunRecord) -> str:
    """Return the page of a run."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=to_text,
    )  # fmt: skip
    environment.tests["numeric"] = lambda value: NUMBER.fullmatch(str(value)) is not None
    environment.filters.update(last_message=last_message, rounded=rounded, level=compute_level)
    summary, data = run.summary, run.summary.get("data") or {}
    health = data.get("weights") or {}
    weights = run.weights
    facts = {
        **{f"hash of {name}": value for name, value in (summary.get("hashes") or {}).items()},
        **{f"seed of {name}": value for name, value in (summary.get("seeds") or {}).items()},
        **{name: summary[name] for name in ("devices", "precision", "commit", "machine") if name in summary},
        **(summary.get("versions") or {}),
    }
    return environment.get_template("page.html.jinja").render(
        run=run,
        conclusion=_conclude(summary),
        warnings=find_warnings(run),
        skipped=count_skipped(data),
        results=[(name, format_cell(value, name)) for name, value in run.measures.items()],
        curves=chart_curves(run.curves),
        health=[(label, f"{health[key]:.3f}") for key, label in WEIGHT_LABELS.items() if key in health],
        histogram=chart_histogram(weights, f"weights of {len(weights)} responses") if len(weights) else None,
        micro_batches=tabulate_micro_batches(run),
        samples=run.samples[:SHOWN_PROMPTS],
        reward_range=find_reward_range(run.samples),
        open=OPEN_PROMPTS,
        data=[(_label(name), value) for name, value in data.items() if name != "weights"],
        facts=list(facts.items()),
    )


def to_text(value: Any) -> str:
    """Return a string unchanged, and anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def last_message(prompt: Any) -> str:
    """Return the text of the last message of a prompt."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return "" if prompt is None else str(prompt)


def rounded(value: Any) -> str:
    """Return a number with three decimals, and a dash for anything else."""
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def find_reward_range(samples: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the lowest and the highest reward of answers before and after training; zeros if there is none."""
    sides = (sample.get(when) or {} for sample in samples for when in ("before", "after"))
    rewards = [reward for side in sides for reward in side.get("rewards") or () if _is_finite(reward)]
    return min(rewards, default=0.0), max(rewards, default=0.0)


def compute_level(reward: Any, bounds: tuple[float, float]) -> int:
    """Return in which quarter of a range a reward is, from 0 to 3."""
    low, high = bounds
    return min(3, int(4 * (reward - low) / (high - low))) if _is_finite(reward) and high > low else 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _label(name: str) -> str:
    return name.replace("_", " ").replace("zero variance", "zero-variance")


def _conclude(summary: Mapping[str, Any]) -> str | None:
    try:
        return conclude(summary.get("validation") or {})
    except (LookupError, TypeError, ValueError, AttributeError):  # a stranger's or an older summary
        return None


def find_warnings(run: RunRecord) -> list[str]:
    """Return what a reader should know before the numbers, from the summary, the curves and the log."""
    summary, warnings = run.summary, []
    data = summary.get("data") or {}
    health = data.get("weights") or {}
    if skipped := summary.get("skipped_steps"):
        warnings.append(f"{skipped} steps were skipped: their loss or gradient was not finite.")
    limit = run.settings.get("trainer.ess_warning") or 0
    sizes = run.curves.get("train/weight/ess", pd.Series(dtype=float))
    low = sizes[(sizes > 0) & (sizes < limit)]
    if len(low):
        warnings.append(
            f"The effective sample size is under {limit:g} of the sequences at {len(low)} of {len(sizes)} logged "
            f"steps, first {low.iloc[0]:.2f} at step {low.index[0]}."
        )
    if health.get("largest", 0) > 50:
        warnings.append(f"The largest weight is {health['largest']:.0f} times the mean.")
    if abs(health.get("length_correlation", 0)) > 0.3:
        warnings.append(f"Weights are correlated with response length: {health['length_correlation']:.2f}.")
    warnings += validation_warnings(summary["validation"])
    if summary.get("dirty"):
        warnings.append("The code had uncommitted changes.")
    log = run.folder / "train.log"
    if log.is_file():
        lines = [LOG_LINE.match(line) for line in log.read_text(errors="replace").splitlines()]
        logged = [(line["logger"], line["text"]) for line in lines if line]
        warnings += [text if logger == "var" else f"{logger}: {text}" for logger, text in logged][:20]
    return list(dict.fromkeys(warnings))  # the log has some of the others


def count_skipped(data: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the counts in the data report of what does not train."""
    return [
        (_label(name), count)
        for name, count in {**data, **(data.get("encoding") or {})}.items()
        if isinstance(count, int) and count and re.search("left out|lost|dropped|skipped|weight", _label(name))
    ]


def chart_curves(curves: Mapping[str, pd.Series]) -> list[Chart]:
    """Return a chart for each known metric, with its standard errors. A judge's win rate is a second, dashed curve."""
    panels = {**PANELS, PEAK_MEMORY: "peak memory, GiB", "validation/accuracy": "accuracy on validation pairs"}
    charts = []
    for name, label in panels.items():
        if name in curves:
            second = curves.get(JUDGE_WIN_RATE) if name == "validation/win_rate" else None
            label += "" if second is None else " (dashed: the judge's)"
            charts.append(chart_curve(curves[name], label, curves.get(f"{name}_se"), second))
    return charts


def chart_curve(
    curve: pd.Series, label: str, errors: pd.Series | None = None, second: pd.Series | None = None
) -> Chart:
    """Return the chart of a curve over optimizer steps, from step 0."""
    curves = [curve] if second is None else [curve, second]
    errors = pd.Series(0.0, curve.index) if errors is None else errors.reindex(curve.index, fill_value=0.0)
    values = pd.concat([*curves, curve - errors, curve + errors])
    low, high, last = values.min(), values.max(), max(*values.index, 1)

    def place_x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last

    def place_y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * ((value - low) / (high - low) if high > low else 0.5)

    return Chart(
        label,
        levels=[(value, place_y(value)) for value in dict.fromkeys((low, high))],
        ends=("0", f"{last} steps"),
        lines=[[(place_x(step), place_y(value)) for step, value in points.items()] for points in curves],
        errors=[(place_x(s), place_y(curve[s] - e), place_y(curve[s] + e)) for s, e in errors.items() if e],
    )


def chart_histogram(values: np.ndarray, label: str) -> Chart:
    """Return a histogram with 24 bars."""
    counts, edges = np.histogram(values, 24)
    most, width = int(counts.max()), (RIGHT - LEFT) / len(counts)
    heights = [(BOTTOM - TOP) * count / most for count in counts.tolist()]
    return Chart(
        label,
        levels=[(0, BOTTOM), (most, TOP)],
        ends=(f"{edges[0]:.3g}", f"{edges[-1]:.3g}"),
        bars=[(LEFT + i * width, BOTTOM - height, width - 1, height) for i, height in enumerate(heights)],
    )


def tabulate_micro_batches(run: RunRecord) -> tuple[str, Sequence[str], Iterable[Sequence[Any]]] | None:
    """Return title, columns and rows of the first micro-batches: their text from batches.jsonl, else the plan."""
    if run.batches:
        rows = [
            [
                r.get("micro_batch"), rounded(r.get("weight")), rounded(r.get("reward")), r.get("id"),
                last_message(r.get("prompt")), r.get("response"),
            ]
            for r in run.batches
        ]  # fmt: skip
        return "The first micro-batches", ["micro-batch", "weight", "reward", "row", "prompt", "response"], rows
    plan = run.plan
    if "micro" not in plan or "row" not in plan:
        return None
    rows = []
    for m, padded in enumerate(plan["micro"][:SHOWN_MICRO_BATCHES]):
        sequences = padded[padded >= 0]
        rows.append([m, int(plan["tokens"][m]), ", ".join(map(str, plan["row"][sequences].tolist()))])
        if "weight" in plan:
            rows[-1].append(", ".join(f"{weight:.3f}" for weight in plan["weight"][sequences]))
    columns = ["micro-batch", "response tokens", "training rows", *(["weights"] if "weight" in plan else [])]
    return f"The first of {len(plan['micro'])} micro-batches", columns, rows
