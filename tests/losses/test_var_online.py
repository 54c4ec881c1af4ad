"""VAR on sampled groups: weights by hand, groups without a signal, and what a rollout aims at in a world of three."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.var_online import VAROnline
from var.requirements import Rewards, Rollout
from var.utils.errors import UserError

# two groups: of three responses (2 tokens, 1, 1), e^{r/λ} = 1, 2, 5 at λ = 2; and of two (1, 2), of equal rewards
LENGTHS, GROUP = [2, 1, 1, 1, 2], [0, 0, 0, 1, 1]
REWARDS = [0.0, 2 * math.log(2), 2 * math.log(5), 0.1, 0.1]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -0.5]


def of_all(loss, batch_of, **extra):
    batch = batch_of(LENGTHS, **{"group": GROUP, "rewards": torch.tensor(REWARDS).double(), **extra})
    return loss_and_gradient(loss, batch, LOGPS)


def test_loss_and_gradient_by_hand(batch_of):
    """Weights 3·(1, 2, 5)/8 = 0.375, 0.75, 1.875 and 0, 0: 0.375·3 + 0.75·4 + 1.875·3 = 9.75 over 14 tokens."""
    value, gradient, metrics = of_all(VAROnline(temperature=2.0), batch_of, global_tokens=14.0)
    assert value == pytest.approx(9.75 / 14, rel=1e-6)
    weights = torch.tensor([0.375, 0.375, 0.75, 1.875, 0, 0, 0], dtype=torch.float64)
    assert_close(gradient, -weights / 14, rtol=1e-6, atol=0)
    assert metrics == pytest.approx(
        {
            "nll": 13 / 7, "reward/mean": sum(REWARDS) / 5, "groups/without_signal": 0.5,
            "weight/mean": 0.6, "weight/square": (0.375**2 + 0.75**2 + 1.875**2) / 5,
        }
    )  # fmt: skip


def test_a_group_without_signal_weighs_1_where_it_is_kept(batch_of):
    """9.75 + 1 + 2 over the step's 6 sequences."""
    loss = VAROnline(temperature=2.0, drop_zero_variance=False, normalize="sequence")
    value, gradient, metrics = of_all(loss, batch_of, global_sequences=6.0)
    assert value == pytest.approx(12.75 / 6, rel=1e-6)
    assert_close(gradient[4:], -torch.ones(3, dtype=torch.float64) / 6)
    assert metrics["weight/mean"] == pytest.approx(1.0)
    assert metrics["groups/without_signal"] == pytest.approx(0.5)


def test_micro_batches_of_whole_groups_add_up(batch_of):
    loss, step = VAROnline(temperature=2.0, drop_zero_variance=False), {"global_tokens": 7.0}
    whole, _, _ = of_all(loss, batch_of)
    rewards, logps = torch.tensor(REWARDS), torch.tensor(LOGPS).double()
    first, _ = loss(logps[:4], batch_of(LENGTHS[:3], group=[0, 0, 0], rewards=rewards[:3], **step))
    second, _ = loss(logps[4:], batch_of(LENGTHS[3:], group=[0, 0], rewards=rewards[3:], **step))
    assert (first + second).item() == pytest.approx(whole, rel=1e-6)
    assert first != second


def test_two_rollouts_aim_at_twice_the_reward(batch_of):
    """Three responses of one token, π_ref = 1/2, 1/4, 1/4, e^{r/λ} = 1, 2, 2. Four samples in these shares: the loss is
    stationary at π_ref e^{r/λ} ∝ 1, 1, 1. Three samples of that: stationary at π_ref e^{2r/λ} ∝ 1, 2, 2."""
    rewards = torch.tensor([0.0, math.log(2), math.log(2)], dtype=torch.float64)

    def gradient(policy, sampled):
        logits = torch.tensor(policy, dtype=torch.float64).log().requires_grad_(True)
        batch = batch_of([1] * len(sampled), group=[0] * len(sampled), rewards=rewards[sampled])
        VAROnline()(logits.log_softmax(0)[sampled], batch)[0].backward()
        return logits.grad.abs().max()

    assert gradient([1, 1, 1], [0, 0, 1, 2]) < 1e-15
    assert gradient([2, 1, 1], [0, 0, 1, 2]) > 0.1
    assert gradient([1, 2, 2], [0, 1, 2]) < 1e-15
    assert gradient([1, 1, 1], [0, 1, 2]) > 0.1


def test_a_small_temperature_does_not_overflow(batch_of):
    """λ = 1e-4: e^{r/λ} is infinite, the weights are 3, 0, 0."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0])
    value, _, _ = of_all(VAROnline(temperature=1e-4), batch_of, rewards=rewards)
    assert value == pytest.approx(3 * 3 / 7)


def test_a_group_of_one_says_what_to_set(batch_of):
    with pytest.raises(UserError, match=r"generate\.responses=1 leaves nothing to compare"):
        of_all(VAROnline(), batch_of, group=[0, 0, 0, 1, 2])


def test_needs_rewards_of_a_rollout_and_no_more():
    assert kinds(VAROnline()) == {Rollout, Rewards}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "loss.temperature is λ > 0, got 0.0"),
        ({"temperature": math.nan}, "loss.temperature is λ > 0, got nan"),
        ({"normalize": "constant"}, "loss.normalize is token or sequence, got constant"),
    ],
)
def test_wrong_settings_say_what_is_allowed(options, message):
    with pytest.raises(UserError) as error:
        VAROnline(**options)
    assert str(error.value) == message
