"""SimPO: mean log-probabilities as rewards and a target margin, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import LENGTHS, kinds, loss_and_gradient
from var.losses.simpo import SimPO
from var.requirements import Pairs
from var.utils.errors import UserError


def test_loss_and_gradient_by_hand(batch_of):
    """β = 2: rewards −3, −8 | −6, −2.5; less γ = 1/2 the margins are 4.5, −4: −log σ 0.0110477, 4.0181499. With γ as
    a ratio to β they would be 4, −4.5.

    Gradient of a token: ∓β σ(−m)/(length · 2 pairs): σ(−4.5) = 0.0109869, σ(4) = 0.9820138.
    """
    value, gradient, metrics = loss_and_gradient(SimPO(beta=2.0, gamma=0.5), batch_of(LENGTHS))
    assert value == pytest.approx((0.0110477448 + 4.0181499279) / 2, rel=1e-9)
    a, b = 0.0109869426, 0.9820137900
    assert_close(gradient, torch.tensor([-a / 2, -a / 2, a, -b, b / 2, b / 2], dtype=torch.float64), rtol=1e-8, atol=0)
    assert metrics == pytest.approx(
        {
            "nll": 12.5 / 6, "logps/chosen": -3.0, "logps/rejected": -3.25,
            "implicit_reward/margin": (5 - 3.5) / 2, "implicit_reward/accuracy": 0.5,
        }
    )  # fmt: skip


def test_needs_pairs_and_no_reference():
    assert kinds(SimPO()) == {Pairs}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"gamma": -0.1}, {"gamma": math.nan}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        SimPO(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.gamma is γ ≥ 0"
