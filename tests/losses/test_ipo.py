"""IPO: the margin of log-ratios, summed (the paper) or averaged over tokens, regressed on 1/(2β)."""

import pytest

from tests.helpers.losses import check_loss
from var.losses.ipo import IPO


@pytest.mark.parametrize(
    ("reduction", "value", "gradient", "margin"),
    [
        # Margins 1.5, −4: (0.5² + 5²)/2. A margin h has gradient h − 1: 0.5, −5.
        ("sum", 12.625, [0.5, 0.5, -0.5, -5, 5, 5], 1.5 - 4),
        # Margins 1 − 0.5 and −2 − 1: (0.5² + 4²)/2. Gradients (h − 1)/length: −0.25, 0.5 | −4, 2.
        ("mean", 8.125, [-0.25, -0.25, 0.5, -4, 2, 2], 0.5 - 3),
    ],
)
def test_loss_matches_hand_computation(pairs, reduction, value, gradient, margin):
    """β = 1/2: the target is 1."""
    metrics = check_loss(IPO(beta=0.5, reduction=reduction), pairs, value, gradient)
    assert metrics["implicit_reward/margin"] == pytest.approx(0.5 * margin / 2)
