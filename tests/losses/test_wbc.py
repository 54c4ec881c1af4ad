"""Weighted behaviour cloning: R · NLL over the step's sequences. Its minimiser over a table stands in test_alol.py."""

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.wbc import WBC
from var.requirements import Rewards
from var.utils.errors import UserError

LENGTHS = [2, 1, 3]
LOGPS = [-1.0, -2.0, -5.0, -0.5, -1.0, -2.5]
REWARDS = [0.5, 2.0, 0.0]


def test_loss_and_gradient_by_hand(batch_of):
    """0.5 · 3 + 2 · 5 + 0 = 11.5 over the step's 4 sequences; a token's gradient is −R/4, whatever its length."""
    rewards = torch.tensor(REWARDS, requires_grad=True)
    batch = batch_of(LENGTHS, rewards=rewards, global_sequences=4.0)
    value, gradient, metrics = loss_and_gradient(WBC(), batch, LOGPS)
    assert value == 11.5 / 4
    assert_close(gradient, -torch.tensor([0.5, 0.5, 2, 0, 0, 0], dtype=torch.float64) / 4)
    assert rewards.grad is None
    assert metrics == pytest.approx({"nll": 2.0, "logps/sequence": -4.0, "weight/mean": 2.5 / 3})


def test_micro_batches_add_up_to_the_whole(batch_of):
    logps, rewards = torch.tensor(LOGPS, dtype=torch.float64), torch.tensor(REWARDS)
    whole, _ = WBC()(logps, batch_of(LENGTHS, rewards=rewards))
    first, _ = WBC()(logps[:2], batch_of(LENGTHS[:1], rewards=rewards[:1], global_sequences=3.0))
    second, _ = WBC()(logps[2:], batch_of(LENGTHS[1:], rewards=rewards[1:], global_sequences=3.0))
    assert float(first + second) == pytest.approx(float(whole), rel=1e-15)


def test_a_negative_reward_is_refused(batch_of):
    with pytest.raises(UserError) as error:
        WBC()(torch.tensor(LOGPS), batch_of(LENGTHS, rewards=torch.tensor([0.5, -1.25, 3.0])))
    assert str(error.value) == (
        "this loss weighs responses by their rewards, and one is -1.25; weights must not be negative: set "
        "reward_scale=sigmoid"
    )


def test_needs_rewards_alone():
    assert kinds(WBC()) == {Rewards}
