"""R-GOLD: a token weighs by its reward and by the policy's own belief in it, floored and without gradient."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds
from var.losses.rgold import RGOLD
from var.losses.wbc import WBC
from var.requirements import Rewards
from var.utils.errors import UserError

# π_t 1/2, 1/20 | 4/5 | 1/10, 1/100
LENGTHS = [2, 1, 2]
PROBABILITIES = [0.5, 0.05, 0.8, 0.1, 0.01]
REWARDS = [1.5, 2.0, 0.25]


def logps():
    return torch.tensor(PROBABILITIES, dtype=torch.float64).log().requires_grad_(True)


def test_loss_and_gradient_by_hand(batch_of):
    """Floor 1/10: beliefs 0.5, 0.1 | 0.8 | 0.1, 0.1, times R: 0.75, 0.15 | 1.6 | 0.025, 0.025; over 6 sequences.

    0.75 log 2 + 0.15 log 20 + 1.6 log 1.25 + 0.025 (log 10 + log 100); a token's gradient is minus its weight.
    """
    values = logps()
    loss, metrics = RGOLD()(values, batch_of(LENGTHS, rewards=torch.tensor(REWARDS), global_sequences=6.0))
    loss.backward()
    total = 0.75 * math.log(2) + 0.15 * math.log(20) + 1.6 * math.log(1.25) + 0.025 * math.log(1000)
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    assert_close(values.grad, -torch.tensor([0.75, 0.15, 1.6, 0.025, 0.025], dtype=torch.float64) / 6)
    nll = -math.log(0.5 * 0.05 * 0.8 * 0.1 * 0.01)
    assert {name: float(sum_ / number) for name, (sum_, number) in metrics.items()} == pytest.approx(
        {"nll": nll / 5, "logps/sequence": -nll / 3, "weight/mean": 1.25}
    )


def test_the_floor_is_a_setting(batch_of):
    """Floor 0.6: 0.6, 0.6 | 0.8 | 0.6, 0.6. Floor 0: the probabilities themselves."""
    for floor, beliefs in ((0.6, [0.6, 0.6, 0.8, 0.6, 0.6]), (0.0, PROBABILITIES)):
        values = logps()
        RGOLD(floor=floor)(values, batch_of(LENGTHS, rewards=torch.ones(3)))[0].backward()
        assert_close(values.grad, -torch.tensor(beliefs, dtype=torch.float64) / 3)


def test_a_policy_that_is_sure_makes_it_weighted_behaviour_cloning(batch_of):
    """π_t → 1: the gradients meet."""
    batch, gradients = batch_of(LENGTHS, rewards=torch.tensor(REWARDS)), []
    for loss in (RGOLD(), WBC()):
        values = torch.full((5,), -1e-9, dtype=torch.float64, requires_grad=True)
        loss(values, batch)[0].backward()
        gradients.append(values.grad)
    assert_close(*gradients, rtol=1e-8, atol=0)


def test_micro_batches_add_up_to_the_whole(batch_of):
    values, rewards = logps().detach(), torch.tensor(REWARDS)
    whole, _ = RGOLD()(values, batch_of(LENGTHS, rewards=rewards))
    first, _ = RGOLD()(values[:3], batch_of(LENGTHS[:2], rewards=rewards[:2], global_sequences=3.0))
    second, _ = RGOLD()(values[3:], batch_of(LENGTHS[2:], rewards=rewards[2:], global_sequences=3.0))
    assert float(first + second) == pytest.approx(float(whole), rel=1e-14)


def test_a_negative_reward_is_refused(batch_of):
    with pytest.raises(UserError, match=r"one is -2; weights must not be negative"):
        RGOLD()(logps(), batch_of(LENGTHS, rewards=torch.tensor([1.0, 1.0, -2.0])))


def test_needs_rewards_alone():
    assert kinds(RGOLD()) == {Rewards}


@pytest.mark.parametrize("floor", [-0.1, 1.0, math.nan])
def test_wrong_settings_say_what_is_allowed(floor):
    with pytest.raises(UserError) as error:
        RGOLD(floor=floor)
    assert str(error.value) == f"loss.floor lies in [0, 1), got {floor}; every token weighing 1 is loss=wbc"
