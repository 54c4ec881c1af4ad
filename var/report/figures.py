"""Draw figures of many runs in one style. Each function returns whether there was something to draw."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from var.report.groups import Group
from var.report.read import EvaluationRecord, read_rate
from var.report.tables import format_cell
from var.utils.files import replace_surrogates
from var.utils.statistics import Estimate, estimate_mean

PANELS = {
    "train/loss": "loss, nats per token",
    "train/weight/ess": "effective sample size",
    "train/grad_norm": "gradient norm",
    "throughput/tokens_per_second": "tokens per second",
    "validation/reward": "validation reward",
    "validation/win_rate": "win rate against the initial policy",
    "validation/length": "response length, tokens",
    "validation/kl": "KL from the reference, nats",
}
JUDGE_WIN_RATE = "validation/judge_win_rate"
PEAK_MEMORY = "throughput/peak_memory_gib"
COLUMNS = 4
MISSING = Estimate(math.nan)
SMOOTHED = 100  # longer training curves are drawn as moving means, with the raw values as thin lines
MOST_SEEDS = 5  # runs per configuration whose samples and weights are drawn, because these files are large
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")  # Okabe and Ito
BLUE, RED, GRAY = COLORS[0], COLORS[1], COLORS[7]
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.3, "lines.markersize": 3,
    "errorbar.capsize": 2, "savefig.dpi": 130, "figure.constrained_layout.use": True, "svg.fonttype": "none",
}  # fmt: skip


@contextmanager
def draw(target: Path, panels: int, size: tuple[float, float], legend: Sequence[str] = ()) -> Iterator[list[Any]]:
    """Yield panels of `size` inches, with a legend of the colors below them, and write the figure to `target`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, pyplot

    target.parent.mkdir(parents=True, exist_ok=True)
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    inches = size[0] * columns, size[1] * rows + 0.16 * len(legend)
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(rows, columns, figsize=inches, squeeze=False)
        try:
            for unused in list(axes.flat)[panels:]:
                unused.remove()
            yield list(axes.flat)[:panels]
            if legend:
                handles = [lines.Line2D([], [], color=color) for _, color in zip(legend, cycle(COLORS), strict=False)]
                figure.legend(handles, [_shorten(label, 100) for label in legend], loc="outside lower left")
            figure.savefig(target)
        finally:
            pyplot.close(figure)


def draw_curves(groups: Sequence[Group], target: Path) -> bool:
    """Draw training and validation metrics: each run as a thin line, and the mean ± standard error over seeds.

    The win rate of a judge is dashed. If a group is one run, its validation reward has the run's own standard errors.
    """
    logged = [name for name in PANELS if any(name in run.curves for group in groups for run in group.runs)]
    if not logged:
        return False
    with draw(target, len(logged), (3.2, 2.6), legend=_label(groups)) as panels:
        for panel, name in zip(panels, logged, strict=True):
            for group, color in zip(groups, cycle(COLORS), strict=False):
                _draw_curve(panel, group, name, color)
                if name == "validation/win_rate":
                    _draw_curve(panel, group, JUDGE_WIN_RATE, color, dashed=True)
            panel.set(xlabel="optimizer step", title=PANELS[name])
    return True


def _draw_curve(panel: Any, group: Group, name: str, color: str, dashed: bool = False) -> None:
    curve = group.curve(name)
    mean, se = curve["mean"], curve["se"]
    if len(mean) > SMOOTHED and name.startswith("train/"):
        panel.plot(mean, color=color, linewidth=0.5, alpha=0.4)
        mean, se = (part.rolling(len(part) // 20, center=True, min_periods=1).mean() for part in (mean, se))
        panel.plot(mean, color=color)
    else:
        panel.plot(mean, color=color, marker="s" if dashed else "o", linestyle="--" if dashed else "-")
    if len(group.runs) > 1:
        gap = pd.Series([np.nan], index=[np.nan])  # all runs are one line with gaps: a sweep has thousands of runs
        runs = pd.concat([part for run in group.runs for part in (run.curves.get(name, gap), gap)])
        panel.plot(runs, color=color, linewidth=0.5, alpha=0.4)
        panel.fill_between(curve.index, mean - se, mean + se, color=color, alpha=0.2, linewidth=0)
    elif name == "validation/reward" and (errors := group.runs[0].curves.get(f"{name}_se")) is not None:
        panel.errorbar(curve.index, mean, errors.reindex(curve.index, fill_value=0.0), color=color, linestyle="none")


def _label(groups: Sequence[Group]) -> list[str]:
    """Return the entries of a legend; none for a single configuration."""
    return [group.label for group in groups] if len(groups) > 1 else []


def _shorten(label: str, limit: int = 44) -> str:
    """Return at most `limit` characters that can be drawn, with $ escaped, as it would start a formula."""
    label = " ".join(replace_surrogates(label).split())
    return (label if len(label) <= limit else f"{label[: limit - 1]}…").replace("$", r"\$")


def draw_frontier(groups: Sequence[Group], target: Path, shown: int = len(COLORS)) -> bool:
    """Draw the reward after training against the KL from the reference, ± standard errors, and each initial policy.

    The first `shown` groups are colored, with their path through the evaluations during training. Further ones are gray
    points. A line joins the Pareto-optimal ones.
    """
    drawn = [g for g in groups if {"reward after", "KL, nats"} <= g.measures.keys()]
    if not drawn:
        return False
    points = [(g.measures["KL, nats"], g.measures["reward after"]) for g in drawn]
    with draw(target, 1, (6.4, 4.2), legend=[group.label for group in drawn[:shown]]) as (panel,):
        if len(drawn) > shown:
            panel.plot([x.mean for x, _ in points], [y.mean for _, y in points], ".", color=GRAY, alpha=0.5)
        pareto = pd.Series(dict(sorted((x.mean, y.mean) for x, y in points)))
        pareto = pareto[pareto > pareto.shift().cummax().fillna(-np.inf)]
        panel.plot(pareto, color=GRAY, linewidth=0.8, zorder=0)
        for group, (x, y), color in zip(drawn, points[:shown], cycle(COLORS), strict=False):
            kl, reward = (group.curve(f"validation/{name}")["mean"] for name in ("kl", "reward"))
            panel.plot(kl, reward.reindex(kl.index), color=color, linewidth=0.8, alpha=0.6)
            panel.errorbar(x.mean, y.mean, xerr=x.se or 0.0, yerr=y.se or 0.0, marker="o", color=color)
        for i, initial in enumerate(
            sorted({g.measures["reward before"].mean for g in drawn if "reward before" in g.measures})
        ):
            panel.plot(0, initial, "*", color="black", markersize=8, label=None if i else "before training")
        panel.set(xlabel="KL from the reference, nats per response", ylabel="reward of validation responses")
        panel.legend()
    return True


def draw_verdicts(evaluations: Sequence[EvaluationRecord], groups: Sequence[Group], target: Path) -> bool:
    """Draw win, tie and loss as percentages of the judged pairs, next to the win rate.

    The pairs are those of eval.py's judge, or of the judge during training, over all runs of a group.
    """
    bars = []
    for evaluation in evaluations:
        bars.append((evaluation.title, _count(evaluation.verdicts), read_rate(evaluation.verdicts)))
    for group in groups:
        games = sum((_count(run.summary["validation"].get("judge") or {}) for run in group.runs), Counter[str]())
        bars.append((group.label, games, group.measures.get("judge's win rate", MISSING).scale(100)))
    bars = [bar for bar in bars if bar[1].total()]
    if not bars:
        return False
    counts = pd.DataFrame([games for _, games, _ in bars], columns=["win", "tie", "loss"]).fillna(0).astype(int)
    percent = 100 * counts.div(counts.sum(axis=1), axis=0)
    with draw(target, 1, (6.4, 1 + 0.4 * len(bars))) as (panel,):
        percent.plot.barh(ax=panel, stacked=True, width=0.6, color=[BLUE, GRAY, RED])
        for name, container in zip(counts, panel.containers, strict=True):
            labels = [str(n) if width > 6 else "" for n, width in zip(counts[name], percent[name], strict=True)]
            panel.bar_label(container, labels, label_type="center", color="white")
        for i, (_, _, rate) in enumerate(bars):
            if not math.isnan(rate.mean):
                panel.text(101, i, f"{format_cell(rate, 'win rate, %')} %", va="center")
        panel.set_yticks(range(len(bars)), [_shorten(title) for title, *_ in bars])
        panel.set(xlim=(0, 118), xlabel="% of judged pairs", ylim=(len(bars) - 0.5, -1.1))
        panel.legend(ncols=3, loc="upper left")
        panel.grid(visible=False)
    return True


def _count(verdicts: Mapping[str, Any]) -> Counter[str]:
    return Counter({name: verdicts[name] for name in ("win", "tie", "loss") if verdicts.get(name)})


def draw_lengths(groups: Sequence[Group], target: Path) -> bool:
    """Draw the length of validation responses before and after training: mean ± standard error, and the middle 90%."""
    drawn = [group for group in groups if {"length before", "length after"} <= group.measures.keys()]
    if not drawn:
        return False
    with draw(target, 1, (6.4, 1 + 0.45 * len(drawn))) as (panel,):
        for i, group in enumerate(drawn):
            for when, shift, color in (("before", -0.14, GRAY), ("after", 0.14, BLUE)):
                length = group.measures[f"length {when}"]
                label = None if i else when
                panel.errorbar(length.mean, i + shift, xerr=length.se or 0.0, marker="o", color=color, label=label)
                samples = [record for run in group.runs[:MOST_SEEDS] for record in run.samples]
                lengths = [n for record in samples for n in (record.get(when) or {}).get("lengths") or ()]
                if lengths:
                    panel.hlines(i + shift, *np.quantile(lengths, [0.05, 0.95]), color=color, linewidth=0.8, alpha=0.6)
        panel.set_yticks(range(len(drawn)), [_shorten(group.label) for group in drawn])
        panel.set(xlabel="tokens per response", ylim=(len(drawn) - 0.5, -0.8))
        panel.set_xlim(0, 1.05 * panel.get_xlim()[1])
        panel.legend(ncols=2)
    return True


def draw_weights(groups: Sequence[Group], target: Path) -> bool:
    """Draw the distribution of the weights, and their effective sample size during training."""
    weights = [[run.weights for run in group.runs[:MOST_SEEDS] if len(run.weights)] for group in groups]
    logged = any("train/weight/ess" in run.curves for group in groups for run in group.runs)
    if not any(weights) and not logged:
        return False
    with draw(target, any(weights) + logged, (4.8, 3.2), legend=_label(groups)) as panels:
        if any(weights):
            for of_group, color in zip(weights, cycle(COLORS), strict=False):
                for of_run in of_group:
                    panels[0].ecdf(of_run / of_run.mean(), complementary=True, color=color, linewidth=0.9)
            panels[0].set(xlabel="weight over the mean weight", title="fraction of responses with at least this weight")
        if logged:
            for group, color in zip(groups, cycle(COLORS), strict=False):
                _draw_curve(panels[-1], group, "train/weight/ess", color)
            panels[-1].set(xlabel="optimizer step", title="effective sample size over sequences", ylim=(0, 1.05))
    return True


def draw_cost(groups: Sequence[Group], target: Path) -> bool:
    """Draw tokens per second, seconds by stage, and the peak memory of the GPU if there is one."""
    if not groups:
        return False
    measures = pd.DataFrame([{name: value.mean for name, value in group.measures.items()} for group in groups])
    seconds = measures.filter(regex="^seconds ").fillna(0.0).rename(columns=lambda name: name.removeprefix("seconds "))
    peaks = [[run.curves[PEAK_MEMORY].max() for run in g.runs if PEAK_MEMORY in run.curves] for g in groups]
    none, places = Estimate(0.0), range(len(groups))
    with draw(target, 3 if any(peaks) else 2, (4.2, 1.2 + 0.35 * len(groups))) as panels:

        def draw_bars(panel: Any, estimates: Sequence[Estimate], title: str) -> None:
            panel.barh(places, [e.mean for e in estimates], xerr=[e.se or 0.0 for e in estimates], height=0.6)
            panel.set(title=title)

        draw_bars(panels[0], [group.measures.get("tokens/s", none) for group in groups], "tokens per second")
        if not seconds.empty:
            seconds.plot.barh(ax=panels[1], stacked=True, width=0.6, color=COLORS)
        panels[1].set(title="seconds")
        panels[1].legend(ncols=3, loc="upper left")
        if any(peaks):
            draw_bars(
                panels[2], [estimate_mean(np.array(values)) if values else none for values in peaks], "peak memory, GiB"
            )
        for panel in panels:
            panel.set(yticks=places, ylim=(len(groups) - 0.5, -1.1))
            panel.set_yticklabels([_shorten(g.label, 32) for g in groups] if panel is panels[0] else [])
    return True


def draw_variance(tables: Sequence[dict[str, Any]], target: Path) -> bool:
    """Draw the relative variance of Ẑ against B or K, as mean ± standard error over seeds, in one panel per world."""
    records = pd.DataFrame([record for table in tables for record in table.get("partition", ())])
    if records.empty:
        return False
    estimators = list(records["estimator"].unique())
    with draw(target, records["world"].nunique(), (3.4, 3.2)) as panels:
        for panel, (world, in_world) in zip(panels, records.groupby("world", sort=False), strict=True):
            for i, name in enumerate(estimators):
                style = {"color": COLORS[i % len(COLORS)], "linestyle": "-" if i < len(COLORS) else ":"}
                by_size = in_world[in_world["estimator"] == name].groupby("size")["relative_variance"]
                errors = by_size.sem().fillna(0.0)
                panel.errorbar(errors.index, by_size.mean(), errors, label=_shorten(name), **style)
            panel.set(xscale="log", yscale="log", xlabel="B or K", title=f"{world}: relative variance of Ẑ")
            sizes = sorted(records["size"].unique())
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
        panels[-1].legend()
    return True
