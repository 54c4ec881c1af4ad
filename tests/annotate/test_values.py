"""V(x): attention that sees no padding, a fit that learns, and numbers that depend on the seed and the prompt alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from var.annotate.value_head import ValueHead

from var.utils.errors import UserError

SIZE = 16
HEAD = ValueHead(
    development_prompts=64, epochs=30, learning_rate=3e-3, heads=4, batch=16, lowest=-1.0, largest=3.0, seed=0
)


def world(n: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Prompts of 2 to 9 noise tokens, one of them of type a or b, anywhere: the reward is 0.25 for a, 2 for b."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(99))
    states, rewards = [], []
    for i in range(n):
        length = int(torch.randint(2, 10, (), generator=generator))
        part = 0.3 * torch.randn(length, SIZE, generator=generator)
        part[int(torch.randint(length, (), generator=generator))] += 2 * types[i % 2]
        states.append(part)
        rewards.append((0.25, 2.0)[i % 2])
    return states, torch.tensor(rewards)


def test_it_learns_which_of_two_tokens_occurs():
    """On prompts it was not fitted on; the mean leaves the variance, 0.765625."""
    head = HEAD.fit(*world(64, seed=0))
    states, rewards = world(100, seed=1)
    values = HEAD.predict(head, states)
    assert values.shape == (100,)
    assert values.dtype == torch.float32
    assert float((values - rewards).square().mean()) < 0.05
    assert float((rewards.mean() - rewards).square().mean()) == pytest.approx(0.765625)


def test_a_prompts_value_does_not_depend_on_its_company():
    head = HEAD.fit(*world(64, seed=0))
    states, _ = world(40, seed=2)
    together = HEAD.predict(head, states)
    assert_close(together, torch.cat([HEAD.predict(head, [part]) for part in states]), rtol=0, atol=1e-6)
    assert_close(together.flip(0), HEAD.predict(head, states[::-1]), rtol=0, atol=1e-6)
    assert together.std() > 0.5
    assert HEAD.predict(head, []).shape == (0,)


@pytest.mark.parametrize("filling", [0.0, 1e4, -7.0])
def test_padding_is_not_seen(filling: float):
    """A padded batch, whatever fills it, gives each prompt the value that it has alone."""
    head = HEAD.fit(*world(64, seed=0))
    states, _ = world(12, seed=3)
    padded, mask = torch.full((12, 11, SIZE), filling), torch.zeros(12, 11, dtype=torch.bool)
    for i, part in enumerate(states):
        padded[i, : len(part)], mask[i, : len(part)] = part, True
    assert_close(head(padded, mask), HEAD.predict(head, states), rtol=0, atol=1e-6)


def test_the_attention_is_torchs_multihead_attention():
    """Its own weights put into torch's module, with a key padding mask: the same attention, then the linear map."""
    head: Any = HEAD.fit(*world(64, seed=0))
    torchs = torch.nn.MultiheadAttention(SIZE, HEAD.heads, batch_first=True)
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.cat([torch.eye(SIZE), *(w.flatten(0, 1) for w in (head.key, head.value))]))
        torchs.in_proj_bias.zero_()
        torchs.out_proj.load_state_dict(head.out.state_dict())
        torch.manual_seed(4)
        states = torch.randn(5, 7, SIZE)
        mask = torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]
        query = head.query.flatten().expand(5, 1, SIZE)
        mixed, _ = torchs(query, states, states, key_padding_mask=~mask)
        expected = -1 + 4 * head.last(mixed[:, 0])[:, 0].sigmoid()
        assert_close(head(states, mask), expected, rtol=1e-5, atol=1e-5)


def test_predictions_start_at_the_mean_reward_and_stay_in_the_range():
    states, rewards = world(10, seed=0)
    still = replace(HEAD, epochs=1, learning_rate=1e-12)
    rewards[0] = 3.0
    assert_close(still.predict(still.fit(states, rewards), states), rewards.mean().expand(10), rtol=0, atol=1e-5)
    wild = replace(HEAD, learning_rate=10.0, epochs=3)
    values = wild.predict(wild.fit(states, rewards), [1e4 * part for part in states])
    assert ((values >= -1) & (values <= 3)).all()


@pytest.mark.parametrize("reward", [-1.0, 3.0])
def test_rewards_that_are_all_at_an_end_of_the_range_can_be_fitted(reward: float):
    """The sigmoid would start where it has no slope, at infinity."""
    states, _ = world(10, seed=0)
    rewards = torch.full((10,), reward)
    assert_close(HEAD.predict(HEAD.fit(states, rewards), states), rewards, rtol=0, atol=0.05)


def test_the_epoch_of_least_training_error_is_kept():
    """At a rate where the error goes up and down, more epochs never leave it higher."""
    states, rewards = world(24, seed=5)
    rewards = rewards + torch.linspace(-1, 1, 24).roll(7)
    errors = []
    for epochs in range(1, 12):
        rough = replace(HEAD, epochs=epochs, learning_rate=0.1)
        errors.append(float((rough.predict(rough.fit(states, rewards), states) - rewards).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) < len(errors)  # some epochs were worse, and left no mark


def test_a_fit_is_its_seeds_and_leaves_the_global_generator_alone():
    states, rewards = world(32, seed=0)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = HEAD.predict(HEAD.fit(states, rewards), states)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    assert torch.equal(HEAD.predict(HEAD.fit(states, rewards), states), first)
    other = replace(HEAD, seed=1)
    assert not torch.equal(other.predict(other.fit(states, rewards), states), first)


def test_states_from_inference_mode_can_be_fitted():
    with torch.inference_mode():
        states = [part.clone() for part in world(16, seed=0)[0]]
    assert states[0].is_inference()
    head = replace(HEAD, epochs=1).fit(states, world(16, seed=0)[1])
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert not head.training


@pytest.mark.parametrize("wrong", [-1.5, 3.5, math.nan])
def test_rewards_outside_the_range_are_refused(wrong: float):
    states, rewards = world(4, seed=0)
    rewards[2] = wrong
    with pytest.raises(UserError, match=r"outside loss\.value\.lowest=-1\.0 to loss\.value\.largest=3\.0"):
        HEAD.fit(states, rewards)


def test_a_fit_that_ends_in_nan_is_refused():
    states, rewards = world(32, seed=0)
    states[3][0, 0] = math.inf
    with pytest.raises(UserError, match=r"not a number: .* or loss\.value\.learning_rate is too high"):
        HEAD.fit(states, rewards)


def test_heads_that_do_not_divide_the_hidden_size_are_refused():
    with pytest.raises(UserError) as error:
        replace(HEAD, heads=5).fit(*world(4, seed=0))
    assert str(error.value) == "loss.value.heads=5 does not divide the reference's hidden size 16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({name: 0}, "loss.value: development_prompts, epochs, heads and batch are ≥ 1, learning_rate is > 0")
            for name in ("development_prompts", "epochs", "heads", "batch", "learning_rate")
        ],
        ({"lowest": 3.0}, "loss.value.lowest=3.0 is not below loss.value.largest=3.0"),
        ({"largest": math.nan}, "loss.value.lowest=-1.0 is not below loss.value.largest=nan"),
    ],
)
def test_wrong_settings_say_what_is_allowed(options: Any, message: str):
    with pytest.raises(UserError) as error:
        replace(HEAD, **options)
    assert str(error.value) == message
