"""RPO: DPO and the NLL of the chosen response per token of it, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.rpo import RPO
from var.requirements import Pairs, ReferenceLogps
from var.utils.errors import UserError


def test_loss_and_gradient_by_hand(pairs):
    """β = 1/2: DPO's margins 0.75, −2, −log σ 0.3868710, 2.1269280. NLL per token of the better: 3/2 and 3/1; α = 1/4:
    0.375, 0.75. By token of both pairs it would be 6/3, and with the worse ones 12.5/6.

    Gradient of a better response's token: −(β σ(−m) + α/length)/2 pairs; of a worse one's: β σ(−m)/2.
    """
    value, gradient, metrics = loss_and_gradient(RPO(beta=0.5, alpha=0.25), pairs)
    assert value == pytest.approx((0.3868710061 + 0.375 + 2.1269280110 + 0.75) / 2, rel=1e-9)
    a, b = 0.25 * 0.3208213008, 0.25 * 0.8807970780
    expected = [-a - 0.0625, -a - 0.0625, a, -b - 0.125, b, b]
    assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics["nll/chosen"] == pytest.approx(2.25)
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_needs_pairs_and_the_reference():
    assert kinds(RPO()) == {Pairs, ReferenceLogps}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"alpha": 0.0}, {"alpha": math.nan}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        RPO(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.alpha is α > 0; for α = 0 use loss=dpo"
