"""PPO: advantages, the clips of the policy and the value head, and the KL penalty as a reward, by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers.losses import compute_means, double, make_batch
from var.losses.ppo import PPO, gae

# Two responses, of 3 tokens and of 1.
LOGPS, RATIOS = [-1.0, -2.0, -4.0, -0.5], [1.5, 1.5, 1.1, 0.5]
OLD_VALUES, MOVES = [0.5, 1.0, -0.5, 0.25], [0.1, 0.5, 0.5, 0.1]
SETTINGS = {"gamma": 0.9, "lam": 0.5}


def compute_ppo(loss: PPO, **fields: Any) -> tuple[float, Tensor, Tensor, dict[str, float]]:
    """Return the loss, its gradients in log-probabilities and values, and the means of its metrics."""
    logps, old_values = double(LOGPS).requires_grad_(True), double(OLD_VALUES)
    values = (old_values + double(MOVES)).requires_grad_(True)
    defaults = {"old_logps": double(LOGPS) - double(RATIOS).log(), "values": values, "old_values": old_values}
    batch = make_batch([3, 1], rewards=[2.0, -1.0], **{**defaults, "global_tokens": 8.0, **fields})
    value, metrics = loss(logps, batch)
    value.backward()
    return value.item(), logps.grad, values.grad, compute_means(metrics)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "expected"),
    [
        # δ = 0.9·1 − 0.5 = 0.4, 0.9·(−0.5) − 1 = −1.45, 2 + 0.5 = 2.5 | −1 − 0.25 = −1.25. The value of the second
        # response does not enter the first. From the end, times 0.45: 2.5; −1.45 + 1.125; 0.4 − 0.14625.
        ([0, 0, 2, -1], OLD_VALUES, 0.9, 0.5, [0.25375, -0.325, 2.5, -1.25]),
        # λ = 1 is return minus value. The returns are 6, 5, 3 | 4.
        ([1, 2, 3, 4], [0.5, -1, 2, 7], 1.0, 1.0, [5.5, 6, 1, -3]),
        # λ = 0 is the one-step error: 1 + V_2 − V_1, 2 + V_3 − V_2, 3 − V_3.
        ([1, 2, 3, 4], [0.5, -1, 2, 7], 1.0, 0.0, [-0.5, 5, 1, -3]),
    ],
)
def test_advantages_match_hand_computation(rewards, values, gamma, lam, expected):
    advantages = gae(double(rewards), double(values), torch.tensor([0, 0, 0, 1]), gamma, lam)
    assert_close(advantages, double(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("lengths", [[7, 1, 4, 9], [1], [1, 1], [2, 16], [17]])
def test_advantages_satisfy_the_recursion(lengths):
    """Â_t = δ_t + γλ Â_{t+1}, written as a loop from each response's end."""
    torch.manual_seed(sum(lengths))
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64)
    expected, first = [], 0
    for length in lengths:
        advantage, next_value, backwards = 0.0, 0.0, []
        for t in reversed(range(first, first + length)):
            advantage = float(rewards[t]) + 0.97 * next_value - float(values[t]) + 0.97 * 0.9 * advantage
            next_value = float(values[t])
            backwards.append(advantage)
        expected += reversed(backwards)
        first += length
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert_close(gae(rewards, values, sequence, 0.97, 0.9), double(expected), rtol=1e-12, atol=1e-14)


def test_loss_and_gradients_match_hand_computation():
    """The advantages are those above. Ratios 1.5, 1.5, 1.1 | 0.5 within 0.2: −1.2·0.25375, 1.5·0.325, −1.1·2.5 |
    0.8·1.25, together −1.567. The first and the last are clipped.

    Returns, advantage plus value: 0.75375, 0.675, 2 | −1. Values now 0.6, 1.5, 0 | 0.35 have errors −0.15375, 0.825, −2
    | 1.35. If moved by at most 0.2, the second would be 1.2, whose smaller error does not count; the third would be
    −0.3, whose error −2.3 counts and stops the gradient. Half squares: 0.01181953125 + 0.3403125 + 2.645 + 0.91125 =
    3.90838203125.
    """
    value, gradient, value_gradient, metrics = compute_ppo(PPO(beta=0.0, value_weight=0.3, **SETTINGS))
    assert value == pytest.approx((-1.567 + 0.3 * 3.90838203125) / 8, rel=1e-12)
    assert_close(gradient, double([0, 1.5 * 0.325, -2.75, 0]) / 8, rtol=1e-12, atol=0)
    assert_close(value_gradient, 0.3 * double([-0.15375, 0.825, 0, 1.35]) / 8, rtol=1e-12, atol=1e-16)
    assert metrics == pytest.approx(
        {
            "nll": 7.5 / 4, "reward/mean": 0.5, "ratio/mean": 4.6 / 4, "ratio/clipped": 0.5,
            "value/loss": 3.90838203125 / 4, "return/mean": 2.42875 / 4,
        }
    )  # fmt: skip


def test_infinite_clip_value_leaves_values_unclipped():
    """The third value's half square is 2² / 2 = 2 instead of 2.645, and has its gradient."""
    loss = PPO(beta=0.0, value_weight=1.0, clip_value=math.inf, **SETTINGS)
    value, _, value_gradient, _ = compute_ppo(loss)
    assert value == pytest.approx((-1.567 + 3.26338203125) / 8, rel=1e-12)
    assert_close(value_gradient, double([-0.15375, 0.825, -2, 1.35]) / 8, rtol=1e-12, atol=0)


def test_kl_penalty_is_a_reward_of_each_token():
    """β = 1/2, log π_old − log π_ref = 1, −1, 0.5 | 2: rewards −0.5, 0.5, 2 − 0.25 | −1 − 1. γ = λ = 1: returns 1.75,
    2.25, 1.75 | −2. On its own samples a token has gradient −(return − value)/4."""
    reference = double(LOGPS) - double([1, -1, 0.5, 2])
    fields = {"old_logps": double(LOGPS), "reference_logps": reference, "global_tokens": 4.0}
    _, gradient, _, metrics = compute_ppo(PPO(beta=0.5, lam=1.0), **fields)
    assert_close(gradient, -double([1.25, 1.25, 2.25, -2.25]) / 4, rtol=1e-12, atol=0)
    assert metrics["return/mean"] == pytest.approx(3.75 / 4)
    assert metrics["kl"] == pytest.approx(sum(math.exp(-d) + d - 1 for d in (1, -1, 0.5, 2)) / 4, rel=1e-12)
