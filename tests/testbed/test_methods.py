"""Losses trained in the exact testbed: which of them end at π*, and where GRPO ends."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.testbed import every_row, random_world
from var.requirements import SequenceScores, find
from var.testbed.methods import list_losses, load_loss, make_policy, sample_rows, train
from var.testbed.policies import TablePolicy

REWARD_UNIT = {"temperature_unit": "reward"}


def train_on_samples(world, loss, *, answers, steps=300, sequences=512, learning_rate=0.05, **options):
    """Return log π [P, Y] of a policy after training on samples."""
    policy, generator = make_policy(world, loss), torch.Generator().manual_seed(0)
    rows = sample_rows(world, loss, policy, generator, answers=answers, sequences=sequences, **options)
    train(policy, world, loss, rows, steps=steps, learning_rate=learning_rate)
    return policy.logps()


@pytest.mark.parametrize("name", list_losses())
def test_every_loss_of_conf_trains(small, name):
    """A new loss is tested here as soon as `conf/loss` has it."""
    loss = load_loss(name)
    if find(loss.requires, SequenceScores):
        pytest.skip("a reward model, not a policy")
    options = {"rewards": small.rewards.sigmoid(), "weights": torch.ones_like(small.rewards)}
    logps = train_on_samples(small, loss, answers=4, steps=3, sequences=48, **options)
    assert logps.isfinite().all()
    assert small.summary(logps, 1.0)["kl_policy_reference"] > 0


@pytest.mark.parametrize("name", ["var", "var_prompt", "var_global"])
def test_exact_weights_lead_var_to_the_optimum(small, name):
    """Every row is in the batch, weighted by its probability, so there is no sampling noise."""
    temperature = 0.7
    rows = every_row(small, (small.optimum(temperature) - small.logps).exp())
    policy = TablePolicy(small)
    train(policy, small, load_loss(name), itertools.repeat(rows), steps=400, learning_rate=0.1)
    found = small.summary(policy.logps(), temperature)
    assert max(found["kl_optimum_policy"], found["kl_policy_optimum"]) < 1e-4


def test_weights_of_another_temperature_do_not(small):
    """Weights of λ = 1.4 lead far from π* of λ = 0.7."""
    rows = every_row(small, (small.optimum(1.4) - small.logps).exp())
    policy = TablePolicy(small)
    train(policy, small, load_loss("var"), itertools.repeat(rows), steps=400, learning_rate=0.1)
    assert small.summary(policy.logps(), 0.7)["kl_optimum_policy"] > 0.05


@pytest.mark.parametrize(
    ("name", "settings", "answers", "options", "within"),
    [
        ("rloo", {"beta": 1.0}, 8, {}, 2e-3),
        ("ppo", {"beta": 1.0, "value_weight": 1.0}, 1, {}, 2e-3),
        ("infonca", {"beta": 1.0, "temperature": 1.0}, 4, {}, 2e-3),
        ("infonca", {"beta": 0.1, "temperature": 10.0}, 4, {}, 2e-3),
        ("trajectory_balance", {"temperature": 1.0}, 4, {}, 2e-3),
        ("trajectory_balance", {"temperature": 1.0, "alpha": 0.0}, 4, {}, 2e-3),
        ("dro", {"temperature": 1.0}, 1, {}, 2e-3),
        ("dpo", {"beta": 1.0}, 2, {"labels": "bradley_terry"}, 1e-2),
        ("var_global", {"temperature": 1.0, **REWARD_UNIT}, 1, {}, 1e-2),
    ],
)
def test_these_losses_reach_the_optimum(name, settings, answers, options, within):
    """λ is β of RLOO, of PPO and of DPO with labels drawn by the reward, αβ of InfoNCA, and their own of the others."""
    world = random_world(1, prompts=4, letters=2, tokens=2)
    found = world.summary(train_on_samples(world, load_loss(name, **settings), answers=answers, **options), 1.0)
    assert max(found["kl_optimum_policy"], found["kl_policy_optimum"]) < within


def test_grpo_with_kl_ends_at_its_own_fixed_point():
    """The gradient of e^d − d − 1 on the policy's own samples is that of KL(π_ref ‖ π).

    So with one token per response GRPO ends at π(y) = β' π_ref(y) / (c − r(y)), not at π*. β' = β K/(K − 1), because
    the group's mean contains the row itself.
    """
    world = random_world(2, prompts=3, letters=3, tokens=1)
    loss = load_loss("dr_grpo", beta=1.0, length=1)
    found = train_on_samples(world, loss, answers=8, steps=400, sequences=1024)
    beta, (low, high) = 8 / 7, (world.rewards.amax(1), world.rewards.amax(1) + 100)
    for _ in range(60):
        c = (low + high) / 2
        above = (beta * world.logps.exp() / (c[:, None] - world.rewards)).sum(1) > 1
        low, high = torch.where(above, c, low), torch.where(above, high, c)
    expected = beta * world.logps.exp() / (c[:, None] - world.rewards)
    assert_close(found.exp(), expected, rtol=0, atol=0.01)
    assert (world.optimum(1.0).exp() - expected).abs().max() > 0.02


def test_an_unknown_loss_or_setting_is_an_error():
    with pytest.raises(Exception, match="Cannot find primary config 'none'"):
        load_loss("none")
    with pytest.raises(Exception, match="temprature"):
        load_loss("var", temprature=1.0)
