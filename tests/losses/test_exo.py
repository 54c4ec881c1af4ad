"""EXO-pref for a pair: the reverse KL to the smoothed label, by hand. It is zero at its target margin."""

import math

import pytest

from tests.helpers.losses import check_loss, double, make_batch, value_and_gradient
from var.losses.exo import EXO


def test_loss_matches_hand_computation(pairs):
    """β = 1/2: margins m = 0.75, −2 and q = σ(m). ε = 1/4: q log(q/0.75) + (1 − q) log((1 − q)/0.25).
    0.6791787 · −0.0991889 + 0.3208213 · 0.2494234 = 0.0126533;
    0.1192029 · −1.8392459 + 0.8807971 · 1.2593664 = 0.8900027.

    A token of a better response has gradient β q(1 − q)(m − log 3)/2 pairs, with q(1 − q) = 0.2178950, 0.1049936.
    """
    a, b = 0.25 * 0.2178949938 * (0.75 - math.log(3)), 0.25 * 0.1049935854 * (-2 - math.log(3))
    value = (0.0126533143 + 0.8900027111) / 2
    metrics = check_loss(EXO(beta=0.5, label_smoothing=0.25), pairs, value, [a, a, -a, b, -b, -b])
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


@pytest.mark.parametrize("offset", [0.0, 1.0, -1.0])
def test_loss_is_zero_and_flat_at_its_target_margin(offset):
    """βh = log((1 − ε)/ε) = log 9: the policy's preference is the label's. A larger margin is drawn back."""
    logps = double([-1.0, -1.0 - math.log(9) / 0.5 - offset])
    batch = make_batch([1, 1], reference_logps=[-1.0, -1.0])
    loss, gradient = value_and_gradient(lambda x: EXO(beta=0.5, label_smoothing=0.1)(x, batch)[0], logps)
    assert (loss.item() > 1e-3) == bool(offset)
    assert loss.item() > -1e-15
    assert (gradient[0].item() > 1e-3) == (offset > 0)
    assert (gradient[0].item() < -1e-3) == (offset < 0)
