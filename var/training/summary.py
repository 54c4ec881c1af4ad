"""What a run leaves behind: summary.json and the closing table. report.py has tables and figures of many."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from var.utils.console import console, warn
from var.utils.errors import UserError
from var.utils.files import atomic


def write(folder: Path, summary: Mapping[str, Any], name: str = "summary.json") -> None:
    with atomic(folder / name) as file:
        json.dump(summary, file, indent=1, ensure_ascii=False, default=str)


def told(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A mean ± its standard error, where it has one."""
    if value is None:
        return "–"
    return f"{value['mean']:.{digits}f}" + ("" if value["se"] is None else f" ± {value['se']:.{digits}f}")


def show(summary: Mapping[str, Any]) -> None:
    """The closing table."""
    table = Table(title=summary["title"], title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    validation = summary["validation"]

    if "accuracy" in validation:
        accuracy = validation["accuracy"]
        table.add_row("accuracy on held-out pairs", told(accuracy["before"]), told(accuracy["after"]))
    elif validation:
        reward, length = validation["reward"], validation["length"]
        table.add_row("validation reward", told(reward["before"]), told(reward["after"]))
        table.add_row("its gain, paired by prompt", "", told(reward["gain"]))
        table.add_row("its win rate against the start", "", told(validation.get("win_rate")))
        if judged := validation.get("judge"):
            known = judged["win_rate"] is not None
            error = judged["se_prompts"]
            rate = {"mean": judged["win_rate"] / 100, "se": None if error is None else error / 100} if known else None
            table.add_row("the judge's win rate, by its protocol", "", told(rate))
        table.add_row("response length, tokens", told(length["before"], 1), told(length["after"], 1))
        table.add_row("KL to the reference, nats", "0", told(validation["kl"]))
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


def warn_of_newer_data(cfg: DictConfig, folder: Path) -> None:
    """A run's folder is named by its configuration, which says where the data lies and not what is in it."""
    try:
        files = instantiate(cfg.data.source).identity().get("files", [])
    except UserError:  # the data is gone, or its hub out of reach; the run is finished all the same
        return
    done = (folder / "summary.json").stat().st_ctime_ns
    if newer := [path for path, *_, written in files if written > done]:
        warn(f"{', '.join(newer)} was written after this run ended: resume=false trains on what is there now.")
