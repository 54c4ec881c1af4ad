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


def make_rollout(**fields: Any) -> Packed:
    """Return the two groups."""
    defaults = {"rewards": [3.0, 1.0, 0.0, 0.0, 3.0], "old_logps": double(LOGPS) - double(RATIOS).log()}
    return make_batch([2, 1, 1, 2, 1], **{"group": [0, 0, 1, 1, 1], **defaults, **fields})


@pytest.mark.parametrize(
    ("options", "value", "a", "b", "divisors"),
    [
        # Means over a sequence's tokens: −(1.3 + 0.5)A/2, 0.8A, 2B, (0.9 + 1.1)B/2, −2.2B, over 6 sequences.
        ({}, (-0.1 * A + 0.8 * B) / 6, A, B, [12, 12, 6, 6, 12, 12, 6]),
        # The sum over tokens is −1.8A + 0.8A + 2B + 2B − 2.2B, over 14 tokens.
        ({"normalize": "token"}, (-A + 1.8 * B) / 14, A, B, [14] * 7),
        # Dr. GRPO: −1 + 1.8, over 6 sequences times 10 tokens.
        ({"scale": "none", "normalize": "constant", "length": 10}, 0.8 / 60, 1.0, 1.0, [60] * 7),
    ],
    ids=["grpo", "token", "dr_grpo"],
)
def test_loss_matches_hand_computation(options, value, a, b, divisors):
    """Rewards 3, 1: mean 2, standard deviation √2, advantages ±A or ±1. Rewards 0, 0, 3: mean 1, standard
    deviation √(6/2), advantages −B, −B, 2B or −1, −1, 2.

    A > 0: ρ = 1.5 is clipped at 1.3, 0.5 is not. A < 0: 0.5 is clipped at 0.8, 2 is not. A token that is not
    clipped has gradient −ρA over its divisor.
    """
    free = [0.0, -0.5 * a, 0.0, 2 * b, 0.9 * b, 1.1 * b, -2.2 * b]
    gradient = [slope / divisor for slope, divisor in zip(free, divisors, strict=True)]
    loss = GRPO(beta=0.0, clip_low=0.2, clip_high=0.3, **options)
    metrics = check_loss(loss, make_rollout(global_tokens=14.0, global_sequences=6.0), value, gradient, LOGPS)
    assert metrics == pytest.approx(
        {"nll": 13 / 7, "reward/mean": 1.4, "groups/zero_variance": 0.0, "ratio/mean": 7.6 / 7, "ratio/clipped": 2 / 7}
    )


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
