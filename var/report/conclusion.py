"""The main result of a run in one sentence."""

from typing import Any

from var.utils.statistics import Estimate


def conclude(validation: dict[str, Any]) -> str | None:
    """Return the result of the validation in summary.json as a sentence, or None without one."""
    if not validation:
        return None
    if "accuracy" in validation:
        before, after = (Estimate.from_json(validation["accuracy"][when]) for when in ("before", "after"))
        return f"Accuracy on validation pairs: {before.mean:.3f} → {after}."
    distance = f"{Estimate.from_json(validation['kl']).mean:.1f} nats from the reference"
    if not validation["reward"]["after"]:
        return f"The policy is {distance}. No reward scored its answers."
    before, after = (Estimate.from_json(validation["reward"][when]) for when in ("before", "after"))
    gain = Estimate.from_json(validation["reward"]["gain"])
    if what := validation.get("counts"):
        percent = gain.scale(100)
        return (
            f"{what.capitalize()} to validation prompts: {before.mean:.0%} → {after.mean:.0%} (a gain of {percent:.0f} "
            f"percentage points), {distance}."
        )
    return (
        f"Reward of answers to validation prompts: {before.mean:.3f} → {after.mean:.3f} (a gain of {gain}), {distance}."
    )
