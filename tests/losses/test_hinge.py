"""The hinge on the log-ratio margin, by hand on both sides of its corner."""

import pytest

from tests.helpers.losses import check_loss
from var.losses.hinge import Hinge


@pytest.mark.parametrize(
    ("beta", "value", "gradient"),
    [
        # 1 − 0.75 and 1 + 2. A token of a better response has gradient −β/2 pairs.
        (0.5, 1.625, [-0.25, -0.25, 0.25, -0.25, 0.25, 0.25]),
        # The target is 1/β = 1. The margins 1.5 and −4 have losses 0 and 5, and the first pair no longer trains.
        (1.0, 2.5, [0.0, 0.0, 0.0, -0.5, 0.5, 0.5]),
    ],
)
def test_loss_matches_hand_computation(pairs, beta, value, gradient):
    metrics = check_loss(Hinge(beta=beta), pairs, value, gradient)
    assert metrics["implicit_reward/margin"] == pytest.approx(beta * (1.5 - 4) / 2)
