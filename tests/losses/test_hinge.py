"""The hinge on the log-ratio margin: values and gradients by hand, on both sides of its corner."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.hinge import Hinge
from var.requirements import Pairs, ReferenceLogps
from var.utils.errors import UserError


def test_loss_and_gradient_by_hand(pairs):
    """β = 1/2: 1 − 0.75 = 0.25 and 1 + 2 = 3; their mean 1.625. Gradient of a better response's token −β/2 pairs."""
    value, gradient, metrics = loss_and_gradient(Hinge(beta=0.5), pairs)
    assert value == 1.625
    assert_close(gradient, torch.tensor([-0.25, -0.25, 0.25, -0.25, 0.25, 0.25], dtype=torch.float64))
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_a_margin_above_its_target_trains_no_more(pairs):
    """β = 1: the target is 1, the margins 1.5 and −4: 0 and 5; the first pair has no gradient."""
    value, gradient, _ = loss_and_gradient(Hinge(beta=1.0), pairs)
    assert value == 2.5
    assert_close(gradient, torch.tensor([0.0, 0.0, 0.0, -0.5, 0.5, 0.5], dtype=torch.float64))


def test_needs_pairs_and_the_reference():
    assert kinds(Hinge()) == {Pairs, ReferenceLogps}


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_wrong_settings_say_what_is_allowed(beta):
    with pytest.raises(UserError) as error:
        Hinge(beta=beta)
    assert str(error.value) == "loss.beta is > 0"
