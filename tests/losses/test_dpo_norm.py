"""Length-normalized DPO: each log-ratio divided by its own tokens, by hand."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import check_loss, make_batch
from var.losses.dpo import DPO
from var.losses.dpo_norm import DPONorm


def test_loss_matches_hand_computation(pairs):
    """Log-ratios per token are 1, 0.5 | −2, 1. β = 2: margins 1 and −6 have −log σ = 0.3132617, 6.0024757.

    A token has gradient ∓β σ(−m)/(length · 2 pairs), with σ(−1) = 0.2689414 and σ(6) = 0.9975274.
    """
    a, b = 0.2689414214, 0.9975273768
    gradient = [-a / 2, -a / 2, a, -b, b / 2, b / 2]
    metrics = check_loss(DPONorm(beta=2.0), pairs, (0.3132616875 + 6.0024756851) / 2, gradient)
    assert metrics["implicit_reward/margin"] == pytest.approx((1 - 6) / 2)
    assert metrics["implicit_reward/accuracy"] == 0.5


def test_equal_lengths_give_dpo_with_beta_over_length():
    torch.manual_seed(0)
    logps, reference = -torch.rand(2, 12, dtype=torch.float64)
    batch = make_batch([3, 3, 3, 3], reference_logps=reference)
    assert_close(DPONorm(beta=6.0)(logps, batch)[0], DPO(beta=2.0)(logps, batch)[0], rtol=1e-14, atol=0)
