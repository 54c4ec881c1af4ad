"""SimPO: mean log-probabilities as rewards, and a target margin, by hand."""

import pytest

from tests.helpers.losses import LENGTHS, check_loss, make_batch
from var.losses.simpo import SimPO


def test_loss_matches_hand_computation():
    """β = 2: the rewards are −3, −8 | −6, −2.5. The margins minus γ = 1/2 are 4.5 and −4, with −log σ = 0.0110477,
    4.0181499. If γ were a ratio to β, they would be 4 and −4.5.

    A token has gradient ∓β σ(−m)/(length · 2 pairs), with σ(−4.5) = 0.0109869 and σ(4) = 0.9820138.
    """
    a, b = 0.0109869426, 0.9820137900
    value, gradient = (0.0110477448 + 4.0181499279) / 2, [-a / 2, -a / 2, a, -b, b / 2, b / 2]
    metrics = check_loss(SimPO(beta=2.0, gamma=0.5), make_batch(LENGTHS), value, gradient, rtol=1e-8)
    assert metrics == pytest.approx(
        {
            "nll": 12.5 / 6, "logps/chosen": -3.0, "logps/rejected": -3.25,
            "implicit_reward/margin": (5 - 3.5) / 2, "implicit_reward/accuracy": 0.5,
        }
    )  # fmt: skip
