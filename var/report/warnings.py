"""What a reader of a run's results should know first."""

from typing import Any

TRUNCATED = 0.2  # fraction of responses
FAR = 10.0  # nats


def validation_warnings(validation: dict[str, Any]) -> list[str]:
    """Return warnings about the validation results in summary.json, with what to set."""
    warnings = []
    truncated = (validation.get("truncated") or {}).get("after") or 0.0
    if truncated > TRUNCATED:
        warnings.append(
            f"{truncated:.0%} of the validation responses after training were truncated. Raise "
            "generate.max_new_tokens, which also sets eval.sampling.max_new_tokens."
        )
    divergence = (validation.get("kl") or {}).get("mean") or 0.0
    if divergence > FAR:
        warnings.append(
            f"The policy is {divergence:.1f} nats from the reference. Lower model.learning_rate or trainer.epochs, or "
            "raise loss.temperature (or loss.beta)."
        )
    return warnings
