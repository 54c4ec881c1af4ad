"""Figures of many runs, in one style: curves over seeds, reward against KL, verdicts, lengths, weights, cost."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from var.report.read import Estimate, Evaluation, Group, estimate, over
from var.report.tables import plain
from var.utils.files import replace_surrogates

PANELS = {
    "train/loss": "loss, nats a token",
    "train/weight/ess": "effective sample size",
    "train/grad_norm": "gradient norm",
    "throughput/tokens_per_second": "tokens per second",
    "validation/reward": "validation reward",
    "validation/win_rate": "win rate against the start",
    "validation/length": "response length, tokens",
    "validation/kl": "KL to the reference, nats",
}
JUDGED = "validation/judge_win_rate"
MEMORY = "throughput/peak_memory_gib"
COLUMNS = 4
FEW = 5  # seeds of a configuration whose single answers and weights are drawn: they are the large files
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")  # Okabe and Ito
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.3, "lines.markersize": 3,
    "errorbar.capsize": 2, "savefig.dpi": 130, "figure.constrained_layout.use": True, "svg.fonttype": "none",
}  # fmt: skip


@contextmanager
def drawing(target: Path, panels: int, size: tuple[float, float], legend: Sequence[str] = ()) -> Iterator[list[Any]]:
    """So many panels of `size` inches, written to `target` at the end; below them what each colour stands for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, pyplot

    target.parent.mkdir(parents=True, exist_ok=True)
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    below = 0.16 * len(legend)
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(size[0] * columns, size[1] * rows + below), squeeze=False
        )
        try:
            for unused in list(axes.flat)[panels:]:
                unused.remove()
            yield list(axes.flat)[:panels]
            if legend:
                handles = [
                    lines.Line2D([], [], color=colour) for _, colour in zip(legend, cycle(COLOURS), strict=False)
                ]
                figure.legend(handles, [_short(label, 100) for label in legend], loc="outside lower left")
            figure.savefig(target)
        finally:
            pyplot.close(figure)


def curves(groups: Sequence[Group], target: Path) -> bool:
    """Training, and validation on prompts that it never saw: each run thin, and the mean ± s.e. over seeds.

    A judge's win rate is dashed. Where a group is one run, the validation reward has its own standard error.
    """
    known = [name for name in PANELS if any(name in run.curves for group in groups for run in group.runs)]
    if not known:
        return False
    with drawing(target, len(known), (3.2, 2.6), legend=_labels(groups)) as panels:
        for panel, name in zip(panels, known, strict=True):
            for group, colour in zip(groups, cycle(COLOURS), strict=False):
                _curve(panel, group, name, colour)
                if name == "validation/win_rate":
                    _curve(panel, group, JUDGED, colour, dashed=True)
            panel.set(xlabel="optimiser step", title=PANELS[name])
    return True


def _curve(panel: Any, group: Group, name: str, colour: str, dashed: bool = False) -> None:
    if len(group.runs) > 1:
        single = [run.curves[name] for run in group.runs if name in run.curves]
        x = np.concatenate([[*steps, np.nan] for steps, _ in single] or [[]])
        y = np.concatenate([[*values, np.nan] for _, values in single] or [[]])
        panel.plot(x, y, color=colour, linewidth=0.5, alpha=0.4)  # one line with gaps: a sweep has thousands of runs
    steps, found = group.curve(name)
    means = np.array([value.mean for value in found])
    style = {"color": colour, "marker": "s" if dashed else "o", "linestyle": "--" if dashed else "-"}
    panel.plot(steps, means, **style)
    if len(group.runs) > 1:
        errors = np.array([value.se for value in found])
        panel.fill_between(steps, means - errors, means + errors, color=colour, alpha=0.2, linewidth=0)
    elif name == "validation/reward":
        own = dict(zip(*group.runs[0].curves.get(f"{name}_se", ([], [])), strict=True))
        panel.errorbar(steps, means, [own.get(step, 0.0) for step in steps], color=colour, linestyle="none")


def _labels(groups: Sequence[Group]) -> list[str]:
    """Of a legend, which one configuration does without."""
    return [group.label for group in groups] if len(groups) > 1 else []


def _short(label: str, limit: int = 44) -> str:
    """At most so long, in letters that can be drawn, and no formula: a $ in a command line is a $."""
    label = " ".join(replace_surrogates(label).split())
    return (label if len(label) <= limit else f"{label[: limit - 1]}…").replace("$", r"\$")


def frontier(groups: Sequence[Group], target: Path, named: int = len(COLOURS)) -> bool:
    """Reward after training against KL to the reference, ± standard errors, from where training started.

    Many configurations are grey points; those than which none has more reward at less KL are joined, and the first
    of the groups are named.
    """
    known = [g for g in groups if {"reward after", "KL, nats"} <= g.measures.keys()]
    if not known:
        return False
    at = [(g.measures["KL, nats"], g.measures["reward after"]) for g in known]
    with drawing(target, 1, (6.4, 4.2), legend=[group.label for group in known[:named]]) as (panel,):
        if len(known) > named:
            panel.plot([x.mean for x, _ in at], [y.mean for _, y in at], ".", color="#999999", alpha=0.5)
        best, front = -np.inf, list[tuple[float, float]]()
        for kl, reward in sorted((x.mean, y.mean) for x, y in at):
            if reward > best:
                best = reward
                front.append((kl, reward))
        panel.plot(*zip(*front, strict=True), color="#999999", linewidth=0.8, zorder=0)
        for _, (x, y), colour in zip(known[:named], at, cycle(COLOURS), strict=False):
            errors = {"xerr": x.se or 0.0, "yerr": y.se or 0.0}
            panel.errorbar(x.mean, y.mean, **errors, marker="o", color=colour)
        if starts := [g.measures["reward before"].mean for g in known if "reward before" in g.measures]:
            panel.plot(0, np.mean(starts), "*", color="black", markersize=8, label="before training")
        panel.set(xlabel="KL to the reference, nats an answer", ylabel="reward of held-out answers")
        panel.legend()
    return True


def verdicts(evaluations: Sequence[Evaluation], groups: Sequence[Group], target: Path) -> bool:
    """Win, tie and loss as shares of the judged pairs, and the win rate: by eval.py's judge, or by the runs' own, their
    pairs together."""
    bars = []
    for one in evaluations:
        rate = {"mean": one.verdicts.get("win_rate"), "se": one.verdicts.get("se_prompts")}
        known = estimate(rate) if rate["mean"] is not None else None
        bars.append((str(one.result.get("title", one.folder.name)), Counter(_games(one.verdicts)), known))
    for group in groups:
        games = Counter[str]()
        for run in group.runs:
            games.update(_games(run.summary["validation"].get("judge") or {}))
        rate_of = group.measures.get("judge's win rate")
        percent = rate_of and Estimate(100 * rate_of.mean, None if rate_of.se is None else 100 * rate_of.se)
        bars.append((group.label, games, percent))
    bars = [bar for bar in bars if bar[1].total()]
    if not bars:
        return False
    with drawing(target, 1, (6.4, 1 + 0.4 * len(bars))) as (panel,):
        for i, (_, games, rate_of) in enumerate(bars):
            left = 0.0
            for name, colour in (("win", COLOURS[0]), ("tie", COLOURS[7]), ("loss", COLOURS[1])):
                share = 100 * games[name] / games.total()
                panel.barh(i, share, left=left, color=colour, height=0.6, label=None if i else name)
                if share > 6:
                    panel.text(left + share / 2, i, str(games[name]), ha="center", va="center", color="white")
                left += share
            if rate_of is not None:
                panel.text(101, i, f"{plain(rate_of, 'win rate, %')} %", va="center")
        panel.set_yticks(range(len(bars)), [_short(bar[0]) for bar in bars])
        panel.set(xlim=(0, 118), xlabel="% of judged pairs", ylim=(len(bars) - 0.5, -1.1))
        panel.legend(ncols=3, loc="upper left")
        panel.grid(visible=False)
    return True


def _games(verdicts: Mapping[str, Any]) -> dict[str, int]:
    return {name: verdicts[name] for name in ("win", "tie", "loss") if verdicts.get(name)}


def lengths(groups: Sequence[Group], target: Path) -> bool:
    """Tokens of held-out answers before and after: means ± standard errors, and the middle 90% of single answers."""
    known = [group for group in groups if {"length before", "length after"} <= group.measures.keys()]
    if not known:
        return False
    with drawing(target, 1, (6.4, 1 + 0.45 * len(known))) as (panel,):
        for i, group in enumerate(known):
            for when, shift, colour in (("before", -0.14, COLOURS[7]), ("after", 0.14, COLOURS[0])):
                mean = group.measures[f"length {when}"]
                label = None if i else when
                panel.errorbar(mean.mean, i + shift, xerr=mean.se or 0.0, marker="o", color=colour, label=label)
                samples = [record for run in group.runs[:FEW] for record in run.samples]
                single = [n for record in samples for n in (record.get(when) or {}).get("lengths") or ()]
                if single:
                    panel.hlines(i + shift, *np.quantile(single, [0.05, 0.95]), color=colour, linewidth=0.8, alpha=0.6)
        panel.set_yticks(range(len(known)), [_short(group.label) for group in known])
        panel.set(xlabel="tokens of an answer", ylim=(len(known) - 0.5, -0.8))
        panel.set_xlim(0, 1.05 * panel.get_xlim()[1])
        panel.legend(ncols=2)
    return True


def weights(groups: Sequence[Group], target: Path) -> bool:
    """How unequal weights are: the share of responses that weigh more, and the effective sample size over training."""
    kept = [[run.weights for run in group.runs[:FEW] if len(run.weights)] for group in groups]
    logged = any("train/weight/ess" in run.curves for group in groups for run in group.runs)
    if not any(kept) and not logged:
        return False
    with drawing(target, any(kept) + logged, (4.8, 3.2), legend=_labels(groups)) as panels:
        if any(kept):
            for several, colour in zip(kept, cycle(COLOURS), strict=False):
                for of_run in several:
                    relative = np.sort(of_run / of_run.mean())
                    more = 1 - np.arange(len(relative)) / len(relative)
                    panels[0].step(relative, more, color=colour, where="post", linewidth=0.9)
            panels[0].set(xlabel="weight over the mean weight", title="share of responses that weigh as much or more")
        if logged:
            for group, colour in zip(groups, cycle(COLOURS), strict=False):
                _curve(panels[-1], group, "train/weight/ess", colour)
            panels[-1].set(xlabel="optimiser step", title="effective sample size over sequences", ylim=(0, 1.05))
    return True


def cost(groups: Sequence[Group], target: Path) -> bool:
    """Tokens a second, seconds by stage, and the GPU's peak memory where there is one."""
    stages = list(dict.fromkeys(name for g in groups for name in g.measures if name.startswith("s of ")))
    memory = {
        i: over(peaks)
        for i, group in enumerate(groups)
        if (peaks := [max(run.curves[MEMORY][1]) for run in group.runs if MEMORY in run.curves])
    }
    with drawing(target, 3 if memory else 2, (4.2, 1.2 + 0.35 * len(groups))) as panels:
        places = range(len(groups))
        rates = [group.measures.get("tokens/s", Estimate(0.0)) for group in groups]
        panels[0].barh(places, [r.mean for r in rates], xerr=[r.se or 0.0 for r in rates], height=0.6)
        panels[0].set(title="tokens a second")
        left = np.zeros(len(groups))
        for stage, colour in zip(stages, cycle(COLOURS), strict=False):
            spent = np.array([group.measures.get(stage, Estimate(0.0)).mean for group in groups])
            panels[1].barh(places, spent, left=left, color=colour, height=0.6, label=stage.removeprefix("s of "))
            left += spent
        panels[1].set(title="seconds")
        panels[1].legend(ncols=3, loc="upper left")
        if memory:
            peaks_of = [memory.get(i, Estimate(0.0)) for i in places]
            panels[2].barh(places, [p.mean for p in peaks_of], xerr=[p.se or 0.0 for p in peaks_of], height=0.6)
            panels[2].set(title="peak memory, GiB")
        for panel in panels:
            panel.set(yticks=places, ylim=(len(groups) - 0.5, -1.1))
            panel.set_yticklabels([_short(g.label, 32) for g in groups] if panel is panels[0] else [])
    return True


def variance(tables: Sequence[dict[str, Any]], target: Path) -> bool:
    """Relative variance of Ẑ against B or K, mean ± standard error over seeds, a panel per world."""
    records = [record for one in tables for record in one.get("partition", ())]
    if not records:
        return False
    worlds = list(dict.fromkeys(record["world"] for record in records))
    names = list(dict.fromkeys(record["estimator"] for record in records))
    with drawing(target, len(worlds), (3.4, 3.2)) as panels:
        for panel, world in zip(panels, worlds, strict=True):
            for i, name in enumerate(names):
                drawn: dict[int, list[float]] = {}
                for record in records:
                    if (record["world"], record["estimator"]) == (world, name):
                        drawn.setdefault(record["size"], []).append(record["relative_variance"])
                found = [over(drawn[size]) for size in sorted(drawn)]
                style = {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else ":"}
                means, errors = [f.mean for f in found], [f.se or 0.0 for f in found]
                panel.errorbar(sorted(drawn), means, errors, label=_short(name), **style)
            panel.set(xscale="log", yscale="log", xlabel="B or K", title=f"{world}: relative variance of Ẑ")
            sizes = sorted({record["size"] for record in records})
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
        panels[-1].legend()
    return True
