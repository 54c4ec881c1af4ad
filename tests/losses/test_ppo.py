"""PPO: advantages, the policy's and the value head's clip, the KL penalty as a reward; by hand, TRL 1.16 has no PPO."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds
from var.losses.common import clipped_surrogate
from var.losses.ppo import PPO, gae
from var.requirements import OldLogps, ReferenceLogps, Rewards, Rollout, TokenValues
from var.utils.errors import UserError

# two responses, of 3 tokens and of 1
LENGTHS, REWARDS = [3, 1], [2.0, -1.0]
LOGPS, RATIOS = [-1.0, -2.0, -4.0, -0.5], [1.5, 1.5, 1.1, 0.5]
OLD_VALUES, MOVES = [0.5, 1.0, -0.5, 0.25], [0.1, 0.5, 0.5, 0.1]
SETTINGS = {"gamma": 0.9, "lam": 0.5}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def given(batch_of, tokens=slice(0, 4), sequences=slice(0, 2), **extra):
    logps = double(LOGPS)[tokens].requires_grad_(True)
    values = (double(OLD_VALUES) + double(MOVES))[tokens].requires_grad_(True)
    numbers = {
        "rewards": torch.tensor(REWARDS)[sequences], "old_logps": (double(LOGPS) - double(RATIOS).log())[tokens],
        "values": values, "old_values": double(OLD_VALUES)[tokens], "global_tokens": 8.0, **extra,
    }  # fmt: skip
    return logps, values, batch_of(LENGTHS[sequences], **numbers)


def test_advantages_by_hand():
    """γ = 0.9, λ = 1/2. δ = 0.9·1 − 0.5 = 0.4, 0.9·(−0.5) − 1 = −1.45, 2 + 0.5 = 2.5 | −1 − 0.25 = −1.25, the second
    response's value being no part of the first's. From the end, times 0.45: 2.5; −1.45 + 1.125; 0.4 − 0.14625."""
    advantages = gae(double([0, 0, 2, -1]), double(OLD_VALUES), torch.tensor([0, 0, 0, 1]), 0.9, 0.5)
    assert_close(advantages, double([0.25375, -0.325, 2.5, -1.25]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("lengths", [[7, 1, 4, 9], [1], [1, 1], [2, 16], [17]])
def test_advantages_are_the_recursion(lengths):
    """Â_t = δ_t + γλ Â_{t+1}, written as a loop from each response's end."""
    torch.manual_seed(sum(lengths))
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64)
    expected, at = [], 0
    for length in lengths:
        ahead, following, backwards = 0.0, 0.0, []
        for t in reversed(range(at, at + length)):
            ahead = float(rewards[t]) + 0.97 * following - float(values[t]) + 0.97 * 0.9 * ahead
            following = float(values[t])
            backwards.append(ahead)
        expected += reversed(backwards)
        at += length
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert_close(gae(rewards, values, sequence, 0.97, 0.9), double(expected), rtol=1e-12, atol=1e-14)


def test_lambda_1_is_the_return_less_the_value_and_lambda_0_the_error_of_one_token():
    """γ = 1; rewards 1, 2, 3 | 4: returns 6, 5, 3 | 4. Errors of a token: 1 + V_2 − V_1, 2 + V_3 − V_2, 3 − V_3 | …"""
    rewards, values, sequence = double([1, 2, 3, 4]), double([0.5, -1, 2, 7]), torch.tensor([0, 0, 0, 1])
    assert_close(gae(rewards, values, sequence, 1.0, 1.0), double([5.5, 6, 1, -3]))
    assert_close(gae(rewards, values, sequence, 1.0, 0.0), double([-0.5, 5, 1, -3]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 2.0, -2.6, 0.0, 1), (0.5, 2.0, -1.0, -1.0, 0), (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, -2.0, 3.0, 3.0, 0), (0.5, -2.0, 1.6, 0.0, 1), (0.9, -2.0, 1.8, 1.8, 0), (0.5, 0.0, 0.0, 0.0, 0),
    ],
)  # fmt: skip
def test_each_side_of_the_clip(ratio, advantage, loss, gradient, clipped):
    """Clipped at 0.8 and 1.3, where that makes the objective smaller: −min(ρA, clip(ρ)A), gradient −ρA or 0."""
    log_ratio = double([ratio]).log().requires_grad_(True)
    losses, metrics = clipped_surrogate(log_ratio, double([advantage]), 0.2, 0.3)
    losses.sum().backward()
    assert_close((losses.detach(), log_ratio.grad), (double([loss]), double([gradient])), rtol=1e-12, atol=1e-15)
    assert metrics["ratio/clipped"] == (clipped, 1.0)


def test_loss_and_gradients_by_hand(batch_of):
    """Advantages as above. Ratios 1.5, 1.5, 1.1 | 0.5 within 0.2: −1.2·0.25375, 1.5·0.325, −1.1·2.5 | 0.8·1.25,
    together −1.567; the first and the last are clipped.

    Returns, advantage plus value: 0.75375, 0.675, 2 | −1. Values now 0.6, 1.5, 0 | 0.35, errors −0.15375, 0.825, −2 |
    1.35. Moved by at most 0.2: the second would be 1.2, whose smaller error does not count; the third −0.3, whose error
    −2.3 does, and stops the gradient. Half squares: 0.01181953125 + 0.3403125 + 2.645 + 0.91125 = 3.90838203125.
    """
    logps, values, batch = given(batch_of)
    loss, metrics = PPO(beta=0.0, value_weight=0.3, **SETTINGS)(logps, batch)
    loss.backward()
    assert loss.item() == pytest.approx((-1.567 + 0.3 * 3.90838203125) / 8, rel=1e-12)
    assert_close(logps.grad, double([0, 1.5 * 0.325, -2.75, 0]) / 8, rtol=1e-12, atol=0)
    assert_close(values.grad, 0.3 * double([-0.15375, 0.825, 0, 1.35]) / 8, rtol=1e-12, atol=1e-16)
    assert {name: float(total / count) for name, (total, count) in metrics.items()} == pytest.approx(
        {
            "nll": 7.5 / 4, "reward/mean": 0.5, "ratio/mean": 4.6 / 4, "ratio/clipped": 0.5,
            "value/loss": 3.90838203125 / 4, "return/mean": 2.42875 / 4,
        }
    )  # fmt: skip


def test_values_unclipped(batch_of):
    """clip_value = ∞: the third value's half square is 2² / 2 = 2 instead of 2.645, and has its gradient."""
    logps, values, batch = given(batch_of)
    loss, _ = PPO(beta=0.0, value_weight=1.0, clip_value=math.inf, **SETTINGS)(logps, batch)
    loss.backward()
    assert loss.item() == pytest.approx((-1.567 + 3.26338203125) / 8, rel=1e-12)
    assert_close(values.grad, double([-0.15375, 0.825, -2, 1.35]) / 8, rtol=1e-12, atol=0)


def test_the_kl_penalty_is_a_reward_of_each_token(batch_of):
    """β = 1/2, log π_old − log π_ref = 1, −1, 0.5 | 2: rewards −0.5, 0.5, 2 − 0.25 | −1 − 1. γ = λ = 1: returns 1.75,
    2.25, 1.75 | −2. On its own samples the gradient of a token is −(return − value)/4."""
    logps, _, batch = given(
        batch_of, old_logps=double(LOGPS), reference_logps=double(LOGPS) - double([1, -1, 0.5, 2]), global_tokens=4.0
    )
    loss, metrics = PPO(beta=0.5, lam=1.0)(logps, batch)
    loss.backward()
    assert_close(logps.grad, -double([1.25, 1.25, 2.25, -2.25]) / 4, rtol=1e-12, atol=0)
    assert float(metrics["return/mean"].total) == pytest.approx(3.75)
    expected = sum(math.exp(-d) + d - 1 for d in (1, -1, 0.5, 2))
    assert float(metrics["kl"].total) == pytest.approx(expected, rel=1e-12)


def test_micro_batches_add_up(batch_of):
    """Nothing in a sequence's loss depends on its neighbours: no whitening."""
    loss = PPO(beta=0.0, **SETTINGS)

    def value(*part):
        logps, _, batch = given(batch_of, *part)
        return loss(logps, batch)[0].item()

    first, second = value(slice(0, 3), slice(0, 1)), value(slice(3, 4), slice(1, 2))
    assert first + second == pytest.approx(value(), rel=1e-14)
    assert first != second


def test_needs_the_reference_where_it_has_a_kl_penalty():
    rollout = {Rollout, Rewards, OldLogps, TokenValues}
    assert kinds(PPO(beta=0.0)) == rollout
    assert kinds(PPO(beta=0.01)) == rollout | {ReferenceLogps}


POLICY = "loss.beta is β ≥ 0 and loss.clip lies in (0, 1]"
GAE = "loss.gamma lies in (0, 1] and loss.lam in [0, 1]"
VALUE = "loss.clip_value and loss.value_weight are > 0; loss.clip_value=.inf clips no value"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, POLICY), ({"beta": math.nan}, POLICY), ({"clip": 0.0}, POLICY), ({"clip": 1.5}, POLICY),
        ({"gamma": 0.0}, GAE), ({"gamma": 1.1}, GAE), ({"lam": -0.1}, GAE), ({"lam": 1.1}, GAE),
        ({"clip_value": 0.0}, VALUE), ({"value_weight": 0.0}, VALUE), ({"value_weight": math.nan}, VALUE),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_is_allowed(options, message):
    with pytest.raises(UserError) as error:
        PPO(**options)
    assert str(error.value) == message
