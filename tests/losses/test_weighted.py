"""loss=weighted: the weight column of the data."""

import pytest

from tests.helpers.losses import check_loss, make_batch
from var.losses.weighted import Weighted

LOGPS = [-0.5, -2.0, -9.0]


@pytest.mark.parametrize(("normalize", "divisor"), [("token", 12), ("sequence", 5)])
def test_loss_matches_hand_computation(normalize, divisor):
    """Σ w·nll = 2 · (0.5 + 2) + 0.25 · 9 = 7.25 over the step's 12 tokens or 5 sequences. A token's gradient is
    −w/divisor, whatever its log-probability and its sequence's length are."""
    batch = make_batch([2, 1], weights=[2.0, 0.25], global_tokens=12.0, global_sequences=5.0)
    gradient = [-weight / divisor for weight in (2.0, 2.0, 0.25)]
    metrics = check_loss(Weighted(normalize=normalize), batch, 7.25 / divisor, gradient, LOGPS)
    assert metrics == pytest.approx({"nll": 11.5 / 3, "weight/mean": 1.125, "weight/square": (4 + 1 / 16) / 2})


def test_tokens_of_weight_0_still_count_in_the_divisor():
    """(0.5 + 2)/3: the divisor counts tokens, not weighted tokens."""
    batch = make_batch([2, 1], weights=[1.0, 0.0])
    check_loss(Weighted(), batch, 2.5 / 3, [-1 / 3, -1 / 3, 0.0], LOGPS)
