"""Robust DPO: by hand, and unbiased over flipped labels."""

import pytest
from torch.testing import assert_close

from tests.helpers.losses import check_loss, double, make_batch
from var.losses.dpo import DPO
from var.losses.robust import Robust


def test_loss_matches_hand_computation(pairs):
    """β = 1/2: margins 0.75, −2. ε = 1/4: (0.75 l(m) − 0.25 l(−m))/0.5 = 1.5 l(m) − 0.5 l(−m), where l = −log σ.
    1.5 · 0.3868710 − 0.5 · 1.1368710 = 0.0118710; 1.5 · 2.1269280 − 0.5 · 0.1269280 = 3.1269280.

    A token of a better response has gradient −(β/2 pairs)(1.5 σ(−m) + 0.5 σ(m)), with σ(−0.75) = 0.3208213 and
    σ(2) = 0.8807971.
    """
    a = 0.25 * (1.5 * 0.3208213008 + 0.5 * 0.6791786992)
    b = 0.25 * (1.5 * 0.8807970780 + 0.5 * 0.1192029220)
    value = (0.0118710061 + 3.1269280110) / 2
    metrics = check_loss(Robust(beta=0.5, label_smoothing=0.25), pairs, value, [-a, -a, a, -b, b, b])
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_expectation_over_flipped_labels_is_dpo():
    """(1 − ε) loss(pair) + ε loss(flipped pair) is DPO's loss of the pair. A flip swaps the two sequences."""
    robust = Robust(beta=0.5, label_smoothing=0.3)
    logps, reference = double([-1.0, -2.0, -4.0]), double([-2.0, -3.5, -4.25])
    pair = make_batch([2, 1], reference_logps=reference)
    flipped = make_batch([1, 2], reference_logps=reference[[2, 0, 1]])
    expected = 0.7 * robust(logps, pair)[0] + 0.3 * robust(logps[[2, 0, 1]], flipped)[0]
    assert_close(expected, DPO(beta=0.5)(logps, pair)[0], rtol=1e-14, atol=0)
