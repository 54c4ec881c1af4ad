"""Weighted behavior cloning: R · NLL over the step's sequences. test_alol.py has its minimizer over a table."""

import pytest

from tests.helpers.losses import check_loss, make_batch
from var.losses.wbc import WBC


def test_loss_matches_hand_computation():
    """0.5 · 3 + 2 · 5 + 0 = 11.5 over the step's 4 sequences. A token's gradient is −R/4 at any response length."""
    batch = make_batch([2, 1, 3], rewards=[0.5, 2.0, 0.0], global_sequences=4.0)
    gradient = [-reward / 4 for reward in (0.5, 0.5, 2, 0, 0, 0)]
    metrics = check_loss(WBC(), batch, 11.5 / 4, gradient, [-1.0, -2.0, -5.0, -0.5, -1.0, -2.5])
    assert metrics == pytest.approx({"nll": 2.0, "logps/sequence": -4.0, "weight/mean": 2.5 / 3})
