"""Run the studies on the exact testbed and write their tables and figures.

    python -m experiments.tabular [folder] [--only part,…]

If a part is run again, its tables and figures are replaced, and those of the other parts are kept.
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

from experiments.tabular.worlds import Record
from var.requirements import Weights, find
from var.testbed.methods import load_loss

PARTS = {
    "fixed": "Where each weight leads for tabular policies",
    "partition": "How well Z(x) is known",
    "finite": "VAR's weights on few rows",
    "argument": "The clip and the bound of the paper's appendix",
    "frontier": "Every objective, trained to the end: reward at its KL from the reference",
    "few": "Every objective on few rows, judged on new prompts",
    "stability": "Losses along training",
}


READINGS = {
    "in_batch mean": "var",
    "in_batch sum": "var_sum",
    "in_batch mean, own": "var_own",
    "in_batch sum, not in the numerator": "var_literal",
}
"""The readings of the paper's Eq. 9 and 10, as the tables name their weights, and their losses."""

SETTINGS = {"temperature", "value", "clip", "rate", "bound"}  # floats that are settings, not measurements


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tabular", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="experiments/tabular", type=Path, help="default: %(default)s")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts separated by commas, of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only: unknown part {', '.join(sorted(unknown))}. Choose from {', '.join(PARTS)}.")
    torch.set_num_threads(1)  # tensors are tiny, so more threads are slower
    arguments.folder.mkdir(parents=True, exist_ok=True)
    stored = arguments.folder / "tables.json"
    records = json.loads(stored.read_text()) if stored.exists() else {}
    for name in (part for part in PARTS if part in chosen):
        started = time.perf_counter()
        records[name] = import_module(f"experiments.tabular.{name}").make_table()
        write(arguments.folder, records, [name])
        print(f"{name}: {len(records[name])} records, {time.perf_counter() - started:.0f} s", flush=True)


def write(folder: Path, records: dict[str, list[Record]], drawn: Iterable[str]) -> None:
    """Write tables.json, tables.md and the figures of the parts in `drawn`."""
    records = {name: records[name] for name in PARTS if name in records}
    (folder / "tables.json").write_text(json.dumps(records, ensure_ascii=False, indent=0) + "\n")
    sections = [f"## {PARTS[name]}\n\n{format_part(name, found)}" for name, found in records.items()]
    (folder / "tables.md").write_text("\n".join([format_readings(), *sections]))
    for name in drawn:
        if name in FIGURES:
            FIGURES[name](records[name], folder / f"{name}.png")


def format_readings() -> str:
    """Return a Markdown table of the readings of the paper's weight."""
    lines = [
        "The paper leaves open how its Eq. 9 and 10 are to be read. `loss=var` takes the first of these readings:\n",
        "| estimator | loss | log π_ref over tokens | of y_j under | π_ref in the numerator |",
        "| --- | --- | --- | --- | --- |",
    ]
    for label, loss in READINGS.items():
        weights = find(load_loss(loss).requires, Weights)
        assert weights is not None
        estimator: Any = weights.estimator
        prompt = {"cross": "x_i", "own": "x_j"}[estimator.reference]
        numerator = "yes" if estimator.reference_in_numerator else "no, as Eq. 10 is printed"
        lines.append(f"| {label} | `{loss}` | {estimator.reduction} | {prompt} | {numerator} |")
    return "\n".join([*lines, ""])


def format_part(name: str, records: list[Record]) -> str:
    """Return a part's tables in Markdown, of means over seeds. Of curves only the last step is in a table."""
    if name == "stability":
        records = [r for r in records if r["step"] == max(q["step"] for q in records)]
    tables: dict[tuple[Any, ...], list[Record]] = {}
    for record in average_seeds(records):
        tables.setdefault((record.get("part"), record.get("regime"), record.get("world")), []).append(record)
    out = []
    for keys, rows in tables.items():
        title = ", ".join(str(key) for key in keys if key is not None)
        out.append((f"{title}\n\n" if title else "") + format_table(rows))
    return "\n".join(out)


def average_seeds(records: list[Record]) -> list[Record]:
    """Return one record of means for all records with equal settings."""
    same: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = tuple((k, v) for k, v in record.items() if k != "seed" and (not isinstance(v, float) or k in SETTINGS))
        same.setdefault(key, []).append(record)
    out = []
    for group in same.values():
        first = {k: v for k, v in group[0].items() if k != "seed"}
        measured = [k for k, v in first.items() if isinstance(v, float) and k not in SETTINGS]
        out.append(first | {k: sum(record[k] for record in group) / len(group) for k in measured})
    return out


def format_table(rows: list[Record]) -> str:
    """Return a Markdown table of the columns that are not empty. A number and its *_error share a column."""
    seen = dict.fromkeys(key for row in rows for key in row)
    hidden = {"part", "regime", "world", "path"}
    columns = [
        key for key in seen
        if not key.endswith("_error") and key not in hidden and any(row.get(key) is not None for row in rows)
    ]  # fmt: skip
    lines = [[key.replace("_", " ") for key in columns], ["---"] * len(columns)]
    lines += [[format_cell(row.get(key), row.get(f"{key}_error")) for key in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_cell(value: Any, error: float | None = None) -> str:
    """Return a number with three decimals, or with three digits if it is large, and "" for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
    return text if error is None or math.isnan(error) else f"{text} ± {error:.3f}"


def draw_frontier(records: list[Record], path: Path) -> None:
    """Draw one panel per family of objectives, with π*'s curve in all of them."""
    from experiments.tabular.methods import METHODS

    families = {method.name: method.family for method in METHODS}
    names = list(dict.fromkeys(families.values()))
    figure, panels = subplots(2, 2, (11, 9))
    limit = [r for r in records if r["regime"] == "limit"]
    for family, panel in zip(names, panels, strict=True):
        panel.plot(*get_columns(limit, "kl_policy_reference", "reward"), color="black", label="π*")
        mine = [r for r in records if families.get(r["method"]) == family]
        for number, name in enumerate(dict.fromkeys(r["method"] for r in mine)):
            style = {
                "color": f"C{number % 10}",
                "linestyle": "-" if number < 10 else ":",
                "marker": "os^"[number // 10],
            }
            points = get_columns([r for r in mine if r["method"] == name], "kl_policy_reference", "reward")
            panel.plot(*points, markersize=3, linewidth=0.8, label=name, **style)
        panel.set(title=family, xlim=(0, 3), ylim=(-0.1, 2.2), xlabel="KL(π ‖ π_ref), nats", ylabel="E[r]")
        panel.legend(fontsize=6, loc="lower right")
    save(figure, path)


def draw_partition(records: list[Record], path: Path) -> None:
    """Draw bias and variance of Ẑ, relative to Z, against B or K, with one column per world."""
    worlds = list(dict.fromkeys(r["world"] for r in records))
    figure, panels = subplots(2, len(worlds), (4 * len(worlds), 6))
    means = average_seeds(records)
    for number, (measure, world) in enumerate((m, w) for m in ("relative_bias", "relative_variance") for w in worlds):
        for name in dict.fromkeys(r["estimator"] for r in means):
            rows = [r for r in means if r["world"] == world and r["estimator"] == name]
            x, y = get_columns(rows, "size", measure)
            panels[number].plot(x, [abs(v) for v in y], marker="o", markersize=3, linewidth=0.8, label=name)
        title = "|relative bias|" if measure == "relative_bias" else "relative variance"
        panels[number].set(xscale="log", yscale="log", xlabel="B or K", title=f"{world}: {title}")
        sizes = sorted({r["size"] for r in means})
        panels[number].set_xticks(sizes, [str(b) for b in sizes])
        panels[number].minorticks_off()
    panels[len(worlds)].legend(fontsize=6)
    save(figure, path)


def draw_argument(records: list[Record], path: Path) -> None:
    """Draw where clipped objectives lead and the most reward at their KL, with one panel per world."""
    clip = average_seeds([r for r in records if r["part"] == "clip"])
    worlds = list(dict.fromkeys(r["world"] for r in clip))
    figure, panels = subplots(1, len(worlds), (4 * len(worlds), 3.5))
    for world, panel in zip(worlds, panels, strict=True):
        rows = sorted((r for r in clip if r["world"] == world), key=lambda r: r["kl_policy_reference"])
        panel.plot(
            *get_columns(rows, "kl_policy_reference", "best_reward"),
            color="black",
            linewidth=0.8,
            label="π* at that KL",
        )
        for name in dict.fromkeys(r["objective"] for r in rows):
            mine = [r for r in rows if r["objective"] == name]
            x, y = get_columns(mine, "kl_policy_reference", "reward")
            panel.plot(x, y, "o", markersize=4, label=name)
            for a, b, r in zip(x, y, mine, strict=True):
                panel.annotate(f"ε = {r['clip']:g}" if r["clip"] else "", (a, b), fontsize=6)
        panel.set(title=world, xlabel="KL(π ‖ π_ref), nats", ylabel="E[r]")
    panels[0].legend(fontsize=6)
    save(figure, path)


def draw_stability(records: list[Record], path: Path) -> None:
    """Draw the loss and log π of the better responses along training."""
    figure, panels = subplots(1, 2, (10, 4))
    for name in dict.fromkeys(r["method"] for r in records):
        rows = [r for r in records if r["method"] == name]
        lines = [panel.plot(*get_columns(rows, "step", key), label=name)
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
    """Return a figure that needs no display, and the list of its panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, across, figsize=size, squeeze=False)
    return figure, list(axes.flat)


def get_columns(rows: list[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return two columns of the records."""
    return [row[x] for row in rows], [row[y] for row in rows]


def save(figure: Any, path: Path) -> None:
    """Write the figure as a PNG."""
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
