"""`python -m experiments.tabular [folder] [--only part,…]`: the exact testbed, all of it, as tables and figures.

A part that is run again replaces its tables and figures and leaves the others' as they are.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


PARTS = {
    "fixed": "Where each weight leads over tables",
    "partition": "How well Z(x) is known",
    "finite": "VAR's weights on few rows",
    "argument": "The clip and the bound of the paper's appendix",
    "frontier": "Every objective, trained to the end: reward at its KL from the reference",
    "few": "Every objective on few rows, judged on new prompts",
    "stability": "Losses along training",
}


SETTINGS = {"temperature", "value", "clip", "rate", "bound"}  # numbers that were set, not measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tabular", description=__doc__)
    parser.add_argument("folder", nargs="?", default="experiments/tabular", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, separated by commas")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # tensors are tiny, threads only wait for each other
    arguments.folder.mkdir(parents=True, exist_ok=True)
    stored = arguments.folder / "tables.json"
    records = json.loads(stored.read_text()) if stored.exists() else {}
    for name in (part for part in PARTS if part in chosen):
        began = time.perf_counter()
        records[name] = import_module(f"experiments.tabular.{name}").table()
        write(arguments.folder, records, [name])
        print(f"{name}: {len(records[name])} records, {time.perf_counter() - began:.0f} s", flush=True)


def write(folder: Path, records: dict[str, list[Record]], drawn: Iterable[str]) -> None:
    """tables.json, tables.md, and the figures of the parts in `drawn`."""
    records = {name: records[name] for name in PARTS if name in records}
    (folder / "tables.json").write_text(json.dumps(records, ensure_ascii=False, indent=0) + "\n")
    sections = [f"## {PARTS[name]}\n\n{tables(name, found)}" for name, found in records.items()]
    (folder / "tables.md").write_text("\n".join(sections))
    for name in drawn:
        if name in FIGURES:
            FIGURES[name](records[name], folder / f"{name}.png")


def tables(name: str, records: list[Record]) -> str:
    """Markdown: means over seeds, a table for each set of columns. Curves are left to the figure but for their ends."""
    if name == "stability":
        records = [r for r in records if r["step"] == max(q["step"] for q in records)]
    kinds: dict[tuple[Any, ...], list[Record]] = {}
    for record in mean_over_seeds(records):
        kinds.setdefault((record.get("part"), record.get("regime"), record.get("world")), []).append(record)
    out = []
    for kind, rows in kinds.items():
        title = ", ".join(str(k) for k in kind if k is not None)
        out.append((f"{title}\n\n" if title else "") + markdown(rows))
    return "\n".join(out)


def mean_over_seeds(records: list[Record]) -> list[Record]:
    """Records that differ in seed and in what was measured become one, of means."""
    same: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = tuple((k, v) for k, v in record.items() if k != "seed" and (not isinstance(v, float) or k in SETTINGS))
        same.setdefault(key, []).append(record)
    out = []
    for several in same.values():
        first = {k: v for k, v in several[0].items() if k != "seed"}
        measured = [k for k, v in first.items() if isinstance(v, float) and k not in SETTINGS]
        out.append(first | {k: sum(record[k] for record in several) / len(several) for k in measured})
    return out


def markdown(rows: list[Record]) -> str:
    """Columns that say something; a number and its *_error share one."""
    seen = dict.fromkeys(key for row in rows for key in row)
    hidden = {"part", "regime", "world", "path"}
    columns = [
        key for key in seen
        if not key.endswith("_error") and key not in hidden and any(row.get(key) is not None for row in rows)
    ]  # fmt: skip
    lines = [[key.replace("_", " ") for key in columns], ["---"] * len(columns)]
    lines += [[cell(row.get(key), row.get(f"{key}_error")) for key in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: Any, error: float | None = None) -> str:
    """Three decimals, or three digits of what is large; nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
    return text if error is None or math.isnan(error) else f"{text} ± {error:.3f}"


def draw_frontier(records: list[Record], path: Path) -> None:
    """A panel for each family of objectives, π*'s curve in all of them."""
    from var.testbed.methods import METHODS

    families = {method.name: method.family for method in METHODS}
    names = list(dict.fromkeys(families.values()))
    figure, panels = subplots(2, 2, (11, 9))
    limit = [r for r in records if r["regime"] == "limit"]
    for family, panel in zip(names, panels, strict=True):
        panel.plot(*columns(limit, "kl_policy_reference", "reward"), color="black", label="π*")
        mine = [r for r in records if families.get(r["method"]) == family]
        for number, name in enumerate(dict.fromkeys(r["method"] for r in mine)):
            style = {
                "color": f"C{number % 10}",
                "linestyle": "-" if number < 10 else ":",
                "marker": "os^"[number // 10],
            }
            points = columns([r for r in mine if r["method"] == name], "kl_policy_reference", "reward")
            panel.plot(*points, markersize=3, linewidth=0.8, label=name, **style)
        panel.set(title=family, xlim=(0, 3), ylim=(-0.1, 2.2), xlabel="KL(π ‖ π_ref), nats", ylabel="E[r]")
        panel.legend(fontsize=6, loc="lower right")
    save(figure, path)


def draw_partition(records: list[Record], path: Path) -> None:
    """Bias and variance of Ẑ, divided by Z, against B or K; a column for each world."""
    worlds = list(dict.fromkeys(r["world"] for r in records))
    figure, panels = subplots(2, len(worlds), (4 * len(worlds), 6))
    means = mean_over_seeds(records)
    for number, (measure, world) in enumerate((m, w) for m in ("relative_bias", "relative_variance") for w in worlds):
        for name in dict.fromkeys(r["estimator"] for r in means):
            rows = [r for r in means if r["world"] == world and r["estimator"] == name]
            x, y = columns(rows, "size", measure)
            panels[number].plot(x, [abs(v) for v in y], marker="o", markersize=3, linewidth=0.8, label=name)
        told = "|relative bias|" if measure == "relative_bias" else "relative variance"
        panels[number].set(xscale="log", yscale="log", xlabel="B or K", title=f"{world}: {told}")
        sizes = sorted({r["size"] for r in means})
        panels[number].set_xticks(sizes, [str(b) for b in sizes])
        panels[number].minorticks_off()
    panels[len(worlds)].legend(fontsize=6)
    save(figure, path)


def draw_argument(records: list[Record], path: Path) -> None:
    """Where clipped objectives lead, beside the most reward at their KL; a panel for each world."""
    clip = mean_over_seeds([r for r in records if r["part"] == "clip"])
    worlds = list(dict.fromkeys(r["world"] for r in clip))
    figure, panels = subplots(1, len(worlds), (4 * len(worlds), 3.5))
    for world, panel in zip(worlds, panels, strict=True):
        rows = sorted((r for r in clip if r["world"] == world), key=lambda r: r["kl_policy_reference"])
        panel.plot(
            *columns(rows, "kl_policy_reference", "best_reward"), color="black", linewidth=0.8, label="π* at that KL"
        )
        for name in dict.fromkeys(r["objective"] for r in rows):
            mine = [r for r in rows if r["objective"] == name]
            x, y = columns(mine, "kl_policy_reference", "reward")
            panel.plot(x, y, "o", markersize=4, label=name)
            for a, b, r in zip(x, y, mine, strict=True):
                panel.annotate(f"ε = {r['clip']:g}" if r["clip"] else "", (a, b), fontsize=6)
        panel.set(title=world, xlabel="KL(π ‖ π_ref), nats", ylabel="E[r]")
    panels[0].legend(fontsize=6)
    save(figure, path)


def draw_stability(records: list[Record], path: Path) -> None:
    """The loss, and log π of the better answers, along training."""
    figure, panels = subplots(1, 2, (10, 4))
    for name in dict.fromkeys(r["method"] for r in records):
        rows = [r for r in records if r["method"] == name]
        lines = [panel.plot(*columns(rows, "step", key), label=name)
                 for panel, key in zip(panels, ("loss", "chosen"), strict=True)]  # fmt: skip
        if rows[0]["bound"] is not None:
            panels[0].axhline(
                rows[0]["bound"], linestyle=":", color=lines[0][0].get_color(), label=f"{name}, its bound"
            )
    panels[0].set(xlabel="step", title="loss", ylim=(-5, 4))
    panels[1].set(xlabel="step", title="log π of the better answers")
    panels[0].legend(fontsize=6)
    save(figure, path)


FIGURES: dict[str, Callable[[list[Record], Path], None]] = {
    "frontier": draw_frontier,
    "partition": draw_partition,
    "argument": draw_argument,
    "stability": draw_stability,
}


def subplots(rows: int, across: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure without a display, and its panels in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, across, figsize=size, squeeze=False)
    return figure, list(axes.flat)


def columns(rows: list[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    return [row[x] for row in rows], [row[y] for row in rows]


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
