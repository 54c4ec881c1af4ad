"""Length-normalised DPO: each log-ratio over its own tokens, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.dpo import DPO
from var.losses.dpo_norm import DPONorm
from var.requirements import Pairs, ReferenceLogps
from var.utils.errors import UserError


def test_loss_and_gradient_by_hand(pairs):
    """Log-ratios a token: 1, 0.5 | −2, 1. β = 2: margins 1, −6; −log σ: 0.3132617, 6.0024757.

    Gradient of a token: ∓β σ(−m)/(length · 2 pairs): σ(−1) = 0.2689414, σ(6) = 0.9975274.
    """
    value, gradient, metrics = loss_and_gradient(DPONorm(beta=2.0), pairs)
    assert value == pytest.approx((0.3132616875 + 6.0024756851) / 2, rel=1e-9)
    a, b = 0.2689414214, 0.9975273768
    assert_close(gradient, torch.tensor([-a / 2, -a / 2, a, -b, b / 2, b / 2], dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics["implicit_reward/margin"] == pytest.approx((1 - 6) / 2)
    assert metrics["implicit_reward/accuracy"] == 0.5


def test_with_equal_lengths_it_is_dpo_at_beta_over_length(batch_of):
    torch.manual_seed(0)
    logps, reference = -torch.rand(2, 12, dtype=torch.float64)
    batch = batch_of([3, 3, 3, 3], reference_logps=reference)
    assert_close(DPONorm(beta=6.0)(logps, batch)[0], DPO(beta=2.0)(logps, batch)[0], rtol=1e-14, atol=0)


def test_needs_pairs_and_the_reference():
    assert kinds(DPONorm()) == {Pairs, ReferenceLogps}


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_wrong_settings_say_what_is_allowed(beta):
    with pytest.raises(UserError) as error:
        DPONorm(beta=beta)
    assert str(error.value) == "loss.beta is β > 0"
