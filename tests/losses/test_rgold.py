"""R-GOLD: a token is weighted by its reward and by the policy's probability of it, floored and without gradient."""

import math

import pytest
import torch

from tests.helpers.losses import check_loss, compute_loss, double, make_batch
from var.losses.rgold import RGOLD
from var.losses.wbc import WBC

LENGTHS = [2, 1, 2]
PROBABILITIES = [0.5, 0.05, 0.8, 0.1, 0.01]
LOGPS = double(PROBABILITIES).log().tolist()
REWARDS = [1.5, 2.0, 0.25]


def test_loss_matches_hand_computation():
    """Floor 1/10: the weights are R times 0.5, 0.1 | 0.8 | 0.1, 0.1, which is 0.75, 0.15 | 1.6 | 0.025, 0.025, over 6
    sequences. The loss is 0.75 log 2 + 0.15 log 20 + 1.6 log 1.25 + 0.025 (log 10 + log 100). The gradient of a token
    is minus its weight."""
    total = 0.75 * math.log(2) + 0.15 * math.log(20) + 1.6 * math.log(1.25) + 0.025 * math.log(1000)
    batch = make_batch(LENGTHS, rewards=REWARDS, global_sequences=6.0)
    gradient = [-weight / 6 for weight in (0.75, 0.15, 1.6, 0.025, 0.025)]
    metrics = check_loss(RGOLD(), batch, total / 6, gradient, LOGPS, rtol=1e-7)
    nll = -math.log(0.5 * 0.05 * 0.8 * 0.1 * 0.01)
    assert metrics == pytest.approx({"nll": nll / 5, "logps/sequence": -nll / 3, "weight/mean": 1.25})


@pytest.mark.parametrize(("floor", "factors"), [(0.6, [0.6, 0.6, 0.8, 0.6, 0.6]), (0.0, PROBABILITIES)])
def test_floor_is_the_smallest_factor_of_a_token(floor, factors):
    """Floor 0 leaves the probabilities unchanged."""
    _, gradient, _ = compute_loss(RGOLD(floor=floor), make_batch(LENGTHS, rewards=[1.0, 1.0, 1.0]), LOGPS)
    torch.testing.assert_close(gradient, -double(factors) / 3)


def test_certain_policy_has_the_gradient_of_weighted_behavior_cloning():
    """As π_t → 1 the gradients become equal."""
    batch = make_batch(LENGTHS, rewards=REWARDS)
    _, gradient, _ = compute_loss(RGOLD(), batch, [-1e-9] * 5)
    torch.testing.assert_close(gradient, compute_loss(WBC(), batch, [-1e-9] * 5)[1], rtol=1e-8, atol=0)
