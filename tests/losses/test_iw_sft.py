"""iw-SFT: by hand, its bound, and SFT at the reference."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import check_loss, make_batch, value_and_gradient
from var.losses.iw_sft import IWSFT
from var.losses.sft import SFT

LOGPS, REFERENCE = [-1.0, -2.0, -4.0], [-2.0, -3.0, -0.5]  # mean log-ratios 1 and −3.5


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [math.exp(1), math.exp(-3.5)]),
        ({"exponent": 2.0}, [math.exp(2), math.exp(-7)]),
        ({"exponent": 2.0, "largest": 4.0}, [4.0, math.exp(-7)]),
    ],
)
def test_loss_matches_hand_computation(settings, weights):
    first, second = weights
    gradient = [-first / 3, -first / 3, -second / 3]
    batch = make_batch([2, 1], reference_logps=REFERENCE)
    metrics = check_loss(IWSFT(**settings), batch, first * 1 + second * 4 / 3, gradient, LOGPS)
    assert metrics["weight/mean"] == pytest.approx((first + second) / 2)


def test_at_the_reference_it_is_sft():
    torch.manual_seed(0)
    logps = -torch.rand(9)
    batch = make_batch([4, 5], reference_logps=logps.clone())
    found = value_and_gradient(lambda x: IWSFT()(x, batch)[0], logps)
    assert_close(found, value_and_gradient(lambda x: SFT()(x, batch)[0], logps), rtol=0, atol=0)
