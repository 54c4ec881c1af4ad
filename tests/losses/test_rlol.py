"""R-LoL: reward times clipped ratio times NLL, by hand."""

import pytest
from torch.testing import assert_close

from tests.helpers.losses import check_loss, compute_loss, double, make_batch
from var.losses.rlol import RLoL
from var.losses.wbc import WBC

LENGTHS = [2, 1, 2]
LOGPS = [-1.0, -2.0, -5.0, -0.5, -1.5]
RATIOS = [2, 0.25, 3, 0.5, 1.2]  # of tokens. Of sequences: 1/2, 3, 3/5
REFERENCE = double(LOGPS) - double(RATIOS).log()
REWARDS = [0.5, 2.0, 1.5]


@pytest.mark.parametrize(
    ("options", "total", "weights", "ratios", "clipped"),
    [
        # Rρ = 0.4, 2.4, 1.2 and NLL 3, 5, 2: 1.2 + 12 + 2.4.
        ({"clip": 0.2}, 15.6, [0.4, 0.4, 2.4, 1.2, 1.2], [0.8, 1.2, 0.8], 1.0),
        # 0.95 · 1 + 0.125 · 2 + 3.8 · 5 + 0.75 · 0.5 + 1.8 · 1.5.
        ({"ratio": "token"}, 23.275, [0.95, 0.125, 3.8, 0.75, 1.8], [1.9, 0.25, 1.9, 0.5, 1.2], 2 / 5),
        # Rρ = 0.25, 6, 0.9: 0.75 + 30 + 1.8.
        ({"clip": None}, 32.55, [0.25, 0.25, 6, 0.9, 0.9], [0.5, 3, 0.6], 0.0),
    ],
    ids=["sequence", "token", "unclipped"],
)
def test_loss_matches_hand_computation(options, total, weights, ratios, clipped):
    """The clip is ε = 0.2 for sequences and 0.9 for tokens. The step has 7 sequences."""
    batch = make_batch(LENGTHS, reference_logps=REFERENCE, rewards=REWARDS, global_sequences=7.0)
    metrics = check_loss(RLoL(**options), batch, total / 7, [-weight / 7 for weight in weights], LOGPS)
    assert metrics == pytest.approx(
        {
            "nll": 2.0, "logps/sequence": -10 / 3, "ratio/mean": sum(ratios) / len(ratios), "ratio/clipped": clipped,
            "weight/mean": 4 / 3,
        }
    )  # fmt: skip


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_loss_at_the_reference_is_weighted_behavior_cloning(ratio):
    """ρ = 1, so value and gradient are those of R · NLL."""
    batch = make_batch(LENGTHS, reference_logps=double(LOGPS), rewards=REWARDS)
    value, gradient, _ = compute_loss(RLoL(ratio=ratio), batch, LOGPS)
    expected, slope, _ = compute_loss(WBC(), batch, LOGPS)
    assert value == pytest.approx(expected, rel=1e-14)
    assert value == pytest.approx((0.5 * 3 + 2 * 5 + 1.5 * 2) / 3, rel=1e-14)
    assert_close(gradient, slope, rtol=1e-14, atol=0)
