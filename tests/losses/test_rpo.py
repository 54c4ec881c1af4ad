"""RPO: DPO plus the NLL per token of the chosen response, by hand."""

import pytest

from tests.helpers.losses import check_loss
from var.losses.rpo import RPO


def test_loss_matches_hand_computation(pairs):
    """β = 1/2: DPO's margins 0.75 and −2 have −log σ = 0.3868710, 2.1269280. The NLL per token of the better responses
    is 3/2 and 3/1; times α = 1/4 that is 0.375 and 0.75. Over the tokens of both pairs it would be 6/3, and with the
    worse responses 12.5/6.

    A token of a better response has gradient −(β σ(−m) + α/length)/2 pairs, one of a worse response β σ(−m)/2 pairs.
    """
    a, b = 0.25 * 0.3208213008, 0.25 * 0.8807970780
    value = (0.3868710061 + 0.375 + 2.1269280110 + 0.75) / 2
    metrics = check_loss(RPO(beta=0.5, alpha=0.25), pairs, value, [-a - 0.0625, -a - 0.0625, a, -b - 0.125, b, b])
    assert metrics["nll/chosen"] == pytest.approx(2.25)
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)
