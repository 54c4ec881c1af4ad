"""EXO-pref for a pair: the reverse KL to the smoothed label, by hand; zero at its target margin."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.exo import EXO
from var.requirements import Pairs, ReferenceLogps
from var.utils.errors import UserError


def test_loss_and_gradient_by_hand(pairs):
    """β = 1/2: margins m = 0.75, −2; q = σ(m); ε = 1/4: q log(q/0.75) + (1 − q) log((1 − q)/0.25).
    0.6791787 · −0.0991889 + 0.3208213 · 0.2494234 = 0.0126533; 0.1192029 · −1.8392459 + 0.8807971 · 1.2593664 =
    0.8900027.

    Gradient of a better response's token: β q(1 − q)(m − log 3)/2 pairs: q(1 − q) = 0.2178950, 0.1049936.
    """
    value, gradient, metrics = loss_and_gradient(EXO(beta=0.5, label_smoothing=0.25), pairs)
    assert value == pytest.approx((0.0126533143 + 0.8900027111) / 2, rel=1e-9)
    a, b = 0.25 * 0.2178949938 * (0.75 - math.log(3)), 0.25 * 0.1049935854 * (-2 - math.log(3))
    assert_close(gradient, torch.tensor([a, a, -a, b, -b, -b], dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_it_is_zero_and_flat_at_its_target_margin(batch_of):
    """βh = log((1 − ε)/ε) = log 9: the policy's preference is the label's. Beyond it the margin is drawn back."""
    target = math.log(9) / 0.5
    for offset, slope in ((0.0, 0.0), (1.0, 1.0), (-1.0, -1.0)):
        logps = torch.tensor([-1.0, -1.0 - target - offset], dtype=torch.float64, requires_grad=True)
        batch = batch_of([1, 1], reference_logps=-torch.ones(2).double())
        loss, _ = EXO(beta=0.5, label_smoothing=0.1)(logps, batch)
        loss.backward()
        assert (loss.item() > 1e-3) == bool(offset)
        assert loss.item() > -1e-15
        assert (logps.grad[0].item() > 1e-3) == (slope > 0)
        assert (logps.grad[0].item() < -1e-3) == (slope < 0)


def test_a_large_margin_has_a_finite_loss_and_gradient(batch_of, pairs):
    """m = ∓1e4: the policy is certain of the wrong answer, KL −log ε, or of the right one, −log(1 − ε); no 0 · ∞."""
    for margin, limit in ((-1e4, -math.log(0.1)), (1e4, -math.log(0.9))):
        logps = torch.tensor([min(margin, 0.0), min(-margin, 0.0)], requires_grad=True)
        loss, _ = EXO(beta=1.0, label_smoothing=0.1)(logps, batch_of([1, 1], reference_logps=torch.zeros(2)))
        loss.backward()
        assert loss.item() == pytest.approx(limit)
        assert_close(logps.grad, torch.zeros(2))


def test_needs_pairs_and_the_reference():
    assert kinds(EXO()) == {Pairs, ReferenceLogps}


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": math.nan}, {"label_smoothing": 0.5}, {"label_smoothing": 0.0}]
)
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        EXO(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.label_smoothing lies in (0, 0.5)"
