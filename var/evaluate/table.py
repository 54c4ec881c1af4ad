"""The closing table of eval.py."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from var.utils.console import console, say
from var.utils.statistics import Estimate


def print_result(result: Mapping[str, Any], against: str) -> None:
    """Print means ± standard errors by prompt, of the reference and of the model."""
    table = Table(title=result["title"], title_justify="left")
    for column in ("", "reference", "model"):
        table.add_column(column, justify="right" if column else "left")

    def add(label: str, reference: Any, model: Any, digits: int = 3) -> None:
        table.add_row(label, *(f"{Estimate.from_json(value):.{digits}f}" for value in (reference, model)))

    model, reference = result["model"], result.get("reference", {"subsets": {}, "averages": {}})
    for name, part in model["subsets"].items():
        initial = reference["subsets"].get(name, {})
        for key in ("reward", "second_reward", "kl", "length"):
            if key in part:
                add(f"{name}: {key}", initial.get(key), part[key])
        add(f"{name}: truncation rate", initial.get("truncated"), part["truncated"], digits=2)
    for name, part in model["averages"].items():
        used, total = len(part["of"]), len(part["of"]) + len(part["without"])
        if total > 1 and "reward" in part:
            count = f"{used} subsets" if used == total else f"{used} of {total} subsets"
            initial = reference["averages"].get(name, {})
            add(f"average, {name} ({count}): reward", initial.get("reward"), part["reward"])
    if rates := result.get("win_rates"):
        facts, overall = rates["facts"], rates["all"]
        rate = {"mean": overall["win_rate"], "se": overall["se_prompts"]}
        add(f"win rate in %, against {against}", None, rate)
        if "lc_win_rate" in facts:
            add("length-controlled win rate in %", None, {"mean": facts["lc_win_rate"], "se": facts.get("lc_se")})
    console.print(table)
    for score in result.get("benchmarks", {}).get("scores", []):
        say(" ".join(f"{key}={value}" for key, value in score.items() if not isinstance(value, list | dict)))
