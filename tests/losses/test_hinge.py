"""The hinge on the log-ratio margin, by hand on both sides of its corner."""

import pytest

from tests.helpers.losses import check_loss
from var.losses.hinge import Hinge


def test_loss_matches_hand_computation(pairs):
    """β = 1/2: the losses are 1 − 0.75 = 0.25 and 1 + 2 = 3. A token of a better response has gradient −β/2 pairs."""
    metrics = check_loss(Hinge(beta=0.5), pairs, 1.625, [-0.25, -0.25, 0.25, -0.25, 0.25, 0.25])
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_margin_above_the_target_has_no_gradient(pairs):
    """β = 1: the margins 1.5 and −4 have losses 0 and 5. The first pair exceeds its target, 1/β."""
    check_loss(Hinge(beta=1.0), pairs, 2.5, [0.0, 0.0, 0.0, -0.5, 0.5, 0.5])
