"""The sentence with the main result of a run."""

from typing import Any

import pytest

from var.report.conclusion import conclude


def estimate(mean: float, se: float = 0.0) -> dict[str, float]:
    return {"mean": mean, "se": se}


REWARD = {"before": estimate(0.08, 0.02), "after": estimate(0.34, 0.04), "gain": estimate(0.26, 0.04)}


@pytest.mark.parametrize(
    ("validation", "sentence"),
    [
        ({}, None),
        ({"accuracy": {"before": estimate(0.5), "after": estimate(0.71, 0.05)}},
         "Accuracy on validation pairs: 0.500 → 0.710 ± 0.050."),
        ({"reward": {"before": None, "after": None, "gain": None}, "kl": estimate(1.62)},
         "The policy is 1.6 nats from the reference. No reward scored its answers."),
        ({"reward": REWARD, "kl": estimate(1.62), "counts": "right answers"},
         "Right answers to validation prompts: 8% → 34% (a gain of 26 ± 4 percentage points), "
         "1.6 nats from the reference."),
        ({"reward": REWARD, "kl": estimate(1.62), "counts": None},
         "Reward of answers to validation prompts: 0.080 → 0.340 (a gain of 0.260 ± 0.040), "
         "1.6 nats from the reference."),
    ],
)  # fmt: skip
def test_sentence_has_the_result_its_error_and_the_distance(validation: dict[str, Any], sentence: str | None) -> None:
    assert conclude(validation) == sentence
