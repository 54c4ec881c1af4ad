"""DFT and ASFT: by hand, and SFT as a limit."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import check_loss, make_batch, value_and_gradient
from var.losses.dft import DFT
from var.losses.sft import SFT


@pytest.mark.parametrize("anchor", [0.0, 0.25])
def test_loss_matches_hand_computation(anchor):
    """Weights p + β at p = 1/2, 1/4, 1/8, without a gradient of their own. The divisor is the step's tokens."""
    logps = [-math.log(2), -math.log(4), -math.log(8)]
    weights = [0.5 + anchor, 0.25 + anchor, 0.125 + anchor]
    value = sum(w * -x for w, x in zip(weights, logps, strict=True)) / 3
    metrics = check_loss(DFT(anchor=anchor), make_batch([2, 1]), value, [-w / 3 for w in weights], logps)
    assert metrics["weight/mean"] == pytest.approx(sum(weights) / 3)


def test_the_anchor_is_sft_times_its_weight():
    torch.manual_seed(0)
    logps, batch = -torch.rand(9, dtype=torch.float64), make_batch([4, 5])
    plain = value_and_gradient(lambda x: DFT()(x, batch)[0], logps)
    anchored = value_and_gradient(lambda x: DFT(anchor=0.3)(x, batch)[0], logps)
    sft = value_and_gradient(lambda x: SFT()(x, batch)[0], logps)
    assert_close([a - p for a, p in zip(anchored, plain, strict=True)], [0.3 * x for x in sft])
