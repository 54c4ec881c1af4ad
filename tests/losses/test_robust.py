"""Robust DPO: values and gradients by hand, and unbiased over flipped labels."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.dpo import DPO
from var.losses.robust import Robust
from var.requirements import Pairs, ReferenceLogps
from var.utils.errors import UserError


def test_loss_and_gradient_by_hand(pairs):
    """β = 1/2: margins 0.75, −2; ε = 1/4: (0.75 l(m) − 0.25 l(−m))/0.5 = 1.5 l(m) − 0.5 l(−m), l = −log σ:
    1.5 · 0.3868710 − 0.5 · 1.1368710 = 0.0118710; 1.5 · 2.1269280 − 0.5 · 0.1269280 = 3.1269280.

    Gradient of a better response's token: −(β/2 pairs)(1.5 σ(−m) + 0.5 σ(m)): σ(−0.75) = 0.3208213, σ(2) = 0.8807971.
    """
    value, gradient, metrics = loss_and_gradient(Robust(beta=0.5, label_smoothing=0.25), pairs)
    assert value == pytest.approx((0.0118710061 + 3.1269280110) / 2, rel=1e-9)
    a = 0.25 * (1.5 * 0.3208213008 + 0.5 * 0.6791786992)
    b = 0.25 * (1.5 * 0.8807970780 + 0.5 * 0.1192029220)
    assert_close(gradient, torch.tensor([-a, -a, a, -b, b, b], dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_its_expectation_over_flipped_labels_is_dpo(batch_of):
    """(1 − ε) loss(pair) + ε loss(pair flipped) is DPO's loss of the pair; a flip swaps the two sequences."""
    robust, whole = Robust(beta=0.5, label_smoothing=0.3), dict(global_sequences=2.0)
    logps, reference = torch.tensor([-1.0, -2.0, -4.0]).double(), torch.tensor([-2.0, -3.5, -4.25]).double()
    pair = batch_of([2, 1], reference_logps=reference, **whole)
    flip = batch_of([1, 2], reference_logps=reference[[2, 0, 1]], **whole)
    expected = 0.7 * robust(logps, pair)[0] + 0.3 * robust(logps[[2, 0, 1]], flip)[0]
    assert_close(expected, DPO(beta=0.5)(logps, pair)[0], rtol=1e-14, atol=0)


def test_the_slope_stays_however_large_the_margin(batch_of):
    """m → ∞: the slope in the margin is −β ε/(1 − 2ε) = −0.5 · 0.25/0.5, not 0, and nothing overflows."""
    logps = torch.tensor([0.0, -1e5], requires_grad=True)
    loss, _ = Robust(beta=0.5, label_smoothing=0.25)(logps, batch_of([1, 1], reference_logps=torch.zeros(2)))
    loss.backward()
    assert loss.item() == -25000.0
    assert_close(logps.grad, torch.tensor([-0.25, 0.25]))


def test_needs_pairs_and_the_reference():
    assert kinds(Robust()) == {Pairs, ReferenceLogps}


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": math.nan}, {"label_smoothing": 0.5}, {"label_smoothing": 0.0}]
)
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        Robust(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.label_smoothing lies in (0, 0.5); for 0 use loss=dpo"
