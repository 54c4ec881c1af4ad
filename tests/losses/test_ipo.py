"""IPO: the margin of log-ratios, summed (the paper) or averaged over tokens, regressed on 1/(2β)."""

import pytest

from tests.helpers.losses import check_loss
from var.losses.ipo import IPO


def test_summed_log_ratios_match_hand_computation(pairs):
    """β = 1/2: the target is 1. Margins 1.5, −4: (0.5² + 5²)/2 = 12.625. A margin h has gradient h − 1: 0.5, −5."""
    metrics = check_loss(IPO(beta=0.5), pairs, 12.625, [0.5, 0.5, -0.5, -5, 5, 5])
    assert metrics["implicit_reward/margin"] == pytest.approx(0.5 * (1.5 - 4) / 2)


def test_averaged_log_ratios_match_hand_computation(pairs):
    """Margins 1 − 0.5 = 0.5 and −2 − 1 = −3: (0.25 + 16)/2. Gradients (h − 1)/length: −0.25, 0.5 | −4, 2."""
    check_loss(IPO(beta=0.5, reduction="mean"), pairs, 8.125, [-0.25, -0.25, 0.5, -4, 2, 2])
