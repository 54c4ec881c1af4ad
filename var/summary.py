"""What a run leaves behind: summary.json, the closing table, and a figure of its curves.

Several runs as a table, and in one figure: python -m var.summary runs/one runs/two figure.png
"""

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from var.files import atomic
from var.progress import console

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
COLUMNS = 4
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


def write(folder: Path, summary: Mapping[str, Any], name: str = "summary.json") -> None:
    with atomic(folder / name) as file:
        json.dump(summary, file, indent=1, ensure_ascii=False, default=str)


def show(summary: Mapping[str, Any], title: str) -> None:
    """The closing table."""
    table = Table(title=title, title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    validation = summary["validation"]

    def estimate(value: Mapping[str, float] | None, digits: int = 3) -> str:
        return "–" if value is None else f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"

    if "accuracy" in validation:
        accuracy = validation["accuracy"]
        table.add_row("accuracy on held-out pairs", estimate(accuracy["before"]), estimate(accuracy["after"]))
    elif validation:
        reward, length = validation["reward"], validation["length"]
        table.add_row("validation reward", estimate(reward["before"]), estimate(reward["after"]))
        table.add_row("its gain, paired by prompt", "", estimate(reward["gain"]))
        table.add_row("its win rate against the start", "", estimate(validation.get("win_rate")))
        if judged := validation.get("judge"):
            known = judged["win_rate"] is not None
            rate = {"mean": judged["win_rate"] / 100, "se": judged["se_prompts"] / 100} if known else None
            table.add_row("the judge's win rate", "", estimate(rate))
        table.add_row("response length, tokens", estimate(length["before"], 1), estimate(length["after"], 1))
        table.add_row("KL to the reference, nats", "0", estimate(validation["kl"]))
    table.add_row("optimiser steps", "", str(summary["steps"]))
    if summary.get("skipped_steps"):
        table.add_row("steps left out, not finite", "", str(summary["skipped_steps"]))
    table.add_row("tokens per second", "", f"{summary['tokens_per_second']:.0f}")
    ess = summary["ess"]
    table.add_row("effective sample size of the weights", "", "–" if ess is None else f"{ess:.2f}")
    groups = summary["data"].get("groups without signal")
    table.add_row("groups without signal", "", "–" if groups is None else f"{groups} of {summary['data']['groups']}")
    table.add_row(
        "sampling and scoring, training, evaluation", "", " + ".join(f"{t:.0f} s" for t in summary["seconds"].values())
    )
    stages = {name.lower(): seconds for name, seconds in summary.get("seconds_of_stages", {}).items() if seconds >= 0.5}
    for name, seconds in sorted(stages.items(), key=lambda item: -item[1]):
        share = seconds / sum(summary["seconds"].values())
        table.add_row(f"of these {name}", "", f"{seconds:.0f} s, {share:.0%}")
    console.print(table)
    console.print(f"Run: {summary['folder']}", markup=False)


def plot(folders: Sequence[Path], target: Path) -> None:
    """The curves of one run or of several: training above, validation on prompts that it never saw below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows_of_panels = len(PANELS) // COLUMNS
    size = (3.2 * COLUMNS, 2.6 * rows_of_panels)
    figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows_of_panels, COLUMNS).ravel()
    for folder in folders:
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
            points = [row for row in rows if row.get(name)]
            steps, values = [int(row["step"]) for row in points], [float(row[name]) for row in points]
            errors = [float(row["validation/reward_se"]) for row in points] if name == "validation/reward" else None
            line = axis.errorbar(steps, values, errors, marker="o", markersize=3, label=folder.name.rsplit("-", 1)[0])
            if name == "validation/win_rate" and (judged := [row for row in rows if row.get(JUDGED)]):
                steps, values = [int(row["step"]) for row in judged], [float(row[JUDGED]) for row in judged]
                axis.plot(steps, values, "s--", color=line[0].get_color(), markersize=3)  # a judge's, dashed
            axis.set(xlabel="optimiser step", title=label)
    if len(folders) > 1:
        axes[0].legend(fontsize="x-small")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def table(folders: Sequence[Path]) -> str:
    """Runs side by side, in Markdown; the overrides say what differed."""
    lines = [
        "| run | steps | reward before | after | gain, paired | KL, nats | length | ESS/n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for folder in folders:
        done = json.loads((folder / "summary.json").read_text())
        overrides = (folder / ".hydra" / "overrides.yaml").read_text().replace("- ", "").split("\n")
        told = " ".join(o for o in overrides if o.startswith(("loss", "seed", "data.responses", "reward"))) or "default"
        reward = done["validation"].get("reward") or done["validation"].get("accuracy") or {}
        length = done["validation"].get("length") or {}

        def cell(value: Mapping[str, float] | None, digits: int = 3) -> str:
            return "–" if value is None else f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"

        ess = "–" if done["ess"] is None else f"{done['ess']:.2f}"
        cells = [f"`{told}`", str(done["steps"]), *(cell(reward.get(when)) for when in ("before", "after", "gain"))]
        lines.append("| " + " | ".join([*cells, cell(done["kl"], 2), cell(length.get("after"), 1), ess]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    places = [Path(argument) for argument in sys.argv[1:]]
    if places and places[-1].suffix == ".png":
        plot(places[:-1], places.pop())
    print(table(places))
