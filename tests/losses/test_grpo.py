"""GRPO, Dr. GRPO and DAPO: advantages, each side of the clip, the KL term and the three divisors, by hand."""

import math
from typing import Any

import pytest

from tests.helpers.losses import check_loss, compute_loss, double, make_batch
from var.losses.grpo import GRPO
from var.models.packing import Packed

# Two groups: of two responses (2 tokens, 1) and of three (1, 2, 1).
RATIOS = [1.5, 0.5, 0.5, 2.0, 0.9, 1.1, 1.1]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -0.5]
# Advantages over the standard deviation: ±A in the first group; −B, −B, 2B in the second.
A, B = 1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(3) + 1e-4)
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def make_rollout(**fields: Any) -> Packed:
    """Return the two groups."""
    defaults = {"rewards": [3.0, 1.0, 0.0, 0.0, 3.0], "old_logps": double(LOGPS) - double(RATIOS).log()}
    return make_batch([2, 1, 1, 2, 1], **{"group": [0, 0, 1, 1, 1], **defaults, **fields})


def compute_gradient(a: float, b: float, divisors: list[float]) -> list[float]:
    """Return −ρA of each token over its divisor, or 0 if the ratio is clipped."""
    free = [0.0, -0.5 * a, 0.0, 2 * b, 0.9 * b, 1.1 * b, -2.2 * b]
    return [slope / divisor for slope, divisor in zip(free, divisors, strict=True)]


def test_grpo_matches_hand_computation():
    """Rewards 3, 1: mean 2, standard deviation √2, advantages ±A. Rewards 0, 0, 3: mean 1, standard deviation √(6/2),
    advantages −B, −B, 2B.

    A > 0: ρ = 1.5 is clipped at 1.3, 0.5 is not. A < 0: 0.5 is clipped at 0.8, 2 is not. Means over a sequence's tokens
    are −(1.3 + 0.5)A/2, 0.8A, 2B, (0.9 + 1.1)B/2, −2.2B. Their sum is −0.1A + 0.8B, over 5 sequences.
    """
    value, gradient = (-0.1 * A + 0.8 * B) / 5, compute_gradient(A, B, [10, 10, 5, 5, 10, 10, 5])
    metrics = check_loss(GRPO(beta=0.0, **CLIP), make_rollout(), value, gradient, LOGPS)
    assert metrics == pytest.approx(
        {"nll": 13 / 7, "reward/mean": 1.4, "groups/zero_variance": 0.0, "ratio/mean": 7.6 / 7, "ratio/clipped": 2 / 7}
    )


def test_token_mean_matches_hand_computation():
    """The sum over tokens, −1.8A + 0.8A + 2B + 2B − 2.2B = −A + 1.8B, over the 14 tokens of the step."""
    loss, batch = GRPO(beta=0.0, normalize="token", **CLIP), make_rollout(global_tokens=14.0)
    check_loss(loss, batch, (-A + 1.8 * B) / 14, compute_gradient(A, B, [14.0] * 7), LOGPS)


def test_dr_grpo_matches_hand_computation():
    """Advantages 1, −1 and −1, −1, 2: −1 + 1.8 = 0.8 over 6 sequences of the step times 10 tokens."""
    loss = GRPO(beta=0.0, scale="none", normalize="constant", length=10, **CLIP)
    gradient = compute_gradient(1.0, 1.0, [60.0] * 7)
    check_loss(loss, make_rollout(global_sequences=6.0), 0.8 / 60, gradient, LOGPS)


UP, DOWN = 1 - math.log(2), math.log(2) - 0.5


@pytest.mark.parametrize(
    ("normalize", "value", "gradient"),
    [
        ("sequence", 0.3 * (UP + (UP + DOWN) / 2) / 2, [-0.15, -0.075, 0.0375]),
        ("token", 0.3 * (2 * UP + DOWN) / 3, [-0.1, -0.1, 0.05]),
    ],
)
def test_kl_term_matches_hand_computation(normalize, value, gradient):
    """Rewards are equal, so A = 0 and only β(e^d − d − 1) is left. e^d = 2: 1 − log 2, with gradient 1 − e^d = −1.
    e^d = 1/2: log 2 − 1/2, with gradient 1/2. The ratio, 3, does not enter. The first sequence has one token of
    e^d = 2, the second has one of each."""
    logps, log2 = [-1.0, -2.0, -3.0], math.log(2)
    batch = make_batch(
        [1, 2], group=[0, 0], rewards=[0.5, 0.5], old_logps=double(logps) - math.log(3),
        reference_logps=double(logps) + double([log2, log2, -log2]),
    )  # fmt: skip
    metrics = check_loss(GRPO(beta=0.3, normalize=normalize), batch, value, gradient, logps)
    assert metrics["kl"] == pytest.approx((2 * UP + DOWN) / 3, rel=1e-12)
    assert metrics["groups/zero_variance"] == 1.0


def test_zero_variance_groups_are_counted_and_have_no_gradient():
    """The second group's rewards are all 0.1, which is not a binary fraction. Its gradient is rounding error."""
    _, gradient, metrics = compute_loss(GRPO(beta=0.0), make_rollout(rewards=[3.0, 1.0, 0.1, 0.1, 0.1]), LOGPS)
    assert metrics["groups/zero_variance"] == pytest.approx(0.5)
    assert gradient[3:].abs().max() < 1e-12 < gradient[1].abs()
