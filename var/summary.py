"""What a run leaves behind: summary.json, the closing table, and a figure of its curves."""

import csv
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from var.progress import console

PACKAGES = ("torch", "lightning", "transformers", "datasets", "hydra-core")


def environment() -> dict[str, Any]:
    """Versions, machine and commit."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain")),
        "machine": platform.machine(),
    }


def write(folder: Path, summary: Mapping[str, Any]) -> None:
    partial = folder / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=1, ensure_ascii=False, default=str))
    partial.replace(folder / "summary.json")


def show(summary: Mapping[str, Any], title: str) -> None:
    """The closing table."""
    table = Table(title=title, title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    validation = summary["validation"]

    def estimate(value: Mapping[str, float] | None, digits: int = 3) -> str:
        return "–" if value is None else f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"

    if validation:
        reward, length = validation["reward"], validation["length"]
        table.add_row("validation reward", estimate(reward["before"]), estimate(reward["after"]))
        table.add_row("its gain, paired by prompt", "", estimate(reward["gain"]))
        table.add_row("response length, tokens", estimate(length["before"], 1), estimate(length["after"], 1))
        table.add_row("KL to the reference, nats", "0", estimate(validation["kl"]))
    table.add_row("optimiser steps", "", str(summary["steps"]))
    table.add_row("tokens per second", "", f"{summary['tokens_per_second']:.0f}")
    ess = summary["ess"]
    table.add_row("effective sample size of the weights", "", "–" if ess is None else f"{ess:.2f}")
    groups = summary["data"].get("groups without signal")
    table.add_row("groups without signal", "", "–" if groups is None else f"{groups} of {summary['data']['groups']}")
    table.add_row(
        "sampling and scoring, training, evaluation", "", " + ".join(f"{t:.0f} s" for t in summary["seconds"].values())
    )
    console.print(table)
    console.print(f"Run: {summary['folder']}", markup=False)


def plot(folder: Path) -> None:
    """plots/curves.png from metrics.csv: loss, validation reward, effective sample size, gradient norm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    panels = {
        "train/loss": "loss, nats a token", "validation/reward": "validation reward",
        "train/weight/ess": "effective sample size", "train/grad_norm": "gradient norm",
    }  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.6), layout="constrained")
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3)
        axis.set(xlabel="optimiser step", title=label)
    (folder / "plots").mkdir(exist_ok=True)
    figure.savefig(folder / "plots" / "curves.png", dpi=120)
    plt.close(figure)
