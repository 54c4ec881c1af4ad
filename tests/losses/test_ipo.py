"""IPO: the margin of log-ratios, summed (the paper) or averaged over tokens, regressed on 1/(2β)."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import LENGTHS, kinds, loss_and_gradient
from var.losses.ipo import IPO
from var.requirements import Pairs, ReferenceLogps
from var.utils.errors import UserError


def test_summed_by_hand(pairs):
    """β = 1/2: target 1. Margins 1.5, −4: (0.5² + 5²)/2 = 12.625. Gradient of a pair's margin: (h − 1): 0.5, −5."""
    value, gradient, metrics = loss_and_gradient(IPO(beta=0.5), pairs)
    assert value == 12.625
    assert_close(gradient, torch.tensor([0.5, 0.5, -0.5, -5, 5, 5], dtype=torch.float64))
    assert metrics["implicit_reward/margin"] == pytest.approx(0.5 * (1.5 - 4) / 2)


def test_averaged_by_hand(pairs):
    """Margins 1 − 0.5 = 0.5 and −2 − 1 = −3: (0.25 + 16)/2 = 8.125. Gradient (h − 1)/length: −0.25, 0.5 | −4, 2."""
    value, gradient, _ = loss_and_gradient(IPO(beta=0.5, reduction="mean"), pairs)
    assert value == 8.125
    assert_close(gradient, torch.tensor([-0.25, -0.25, 0.5, -4, 2, 2], dtype=torch.float64))


def test_step_0_is_the_squared_target(batch_of):
    """Policy = reference: (1/(2β))² = 25 at β = 1/10."""
    logps = -torch.rand(6)
    loss, _ = IPO()(logps, batch_of(LENGTHS, reference_logps=logps))
    assert loss.item() == pytest.approx(25.0)


def test_needs_pairs_and_the_reference():
    assert kinds(IPO()) == {Pairs, ReferenceLogps}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"reduction": "token"}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        IPO(**options)
    assert str(error.value) == "loss.beta is > 0 and loss.reduction is sum or mean"
