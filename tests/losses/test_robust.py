"""Robust DPO: values and gradients by hand, and unbiased over flipped labels."""

import math

import pytest
import torch
from torch.testing import assert_close

from var.losses.dpo import DPO
from var.losses.robust import Robust
from var.needs import Need
from var.problems import UserError

# sequences: better (2 tokens), worse (1); better (1), worse (2)
LENGTHS = [2, 1, 1, 2]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5]
REFERENCE = [-2.0, -3.0, -4.5, -1.0, -2.0, -2.5]
# log-ratios: 2.0, 0.5 | −2.0, 2.0. Margins: 1.5, −4.0


def loss_and_gradient(loss, batch_of, **extra):
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    value, metrics = loss(logps, batch_of(LENGTHS, reference_logps=torch.tensor(REFERENCE), **extra))
    value.backward()
    return value.item(), logps.grad, {name: float(total / number) for name, (total, number) in metrics.items()}


def test_loss_and_gradient_by_hand(batch_of):
    """β = 1/2: margins 0.75, −2; ε = 1/4: (0.75 l(m) − 0.25 l(−m))/0.5 = 1.5 l(m) − 0.5 l(−m), l = −log σ:
    1.5 · 0.3868710 − 0.5 · 1.1368710 = 0.0118710; 1.5 · 2.1269280 − 0.5 · 0.1269280 = 3.1269280.

    Gradient of a better response's token: −(β/2 pairs)(1.5 σ(−m) + 0.5 σ(m)): σ(−0.75) = 0.3208213, σ(2) = 0.8807971.
    """
    value, gradient, metrics = loss_and_gradient(Robust(beta=0.5, label_smoothing=0.25), batch_of)
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


def test_pairs_of_a_step_add_up_over_micro_batches(batch_of):
    """The divisor is the step's pairs: two micro-batches of one pair sum to the whole."""
    whole, _, _ = loss_and_gradient(Robust(beta=0.5, label_smoothing=0.25), batch_of)
    total = 0.0
    for sequences, tokens in ((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 6))):
        batch = batch_of(LENGTHS[sequences], reference_logps=torch.tensor(REFERENCE[tokens]), global_sequences=4.0)
        total += Robust(beta=0.5, label_smoothing=0.25)(torch.tensor(LOGPS[tokens]).double(), batch)[0].item()
    assert total == pytest.approx(whole, rel=1e-15)


def test_needs_pairs_and_the_reference():
    assert Robust().needs == {Need.PAIRS, Need.REFERENCE_LOGPS}


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": math.nan}, {"label_smoothing": 0.5}, {"label_smoothing": 0.0}]
)
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        Robust(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.label_smoothing lies in (0, 0.5); for 0 use loss=dpo"
