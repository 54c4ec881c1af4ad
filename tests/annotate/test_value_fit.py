"""V(x): attention that ignores padding, a fit that learns, and numbers that depend only on seed and prompt."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from var.annotate.value_fit import fit_value_head, predict_values
from var.requirements import ValueFit
from var.utils.errors import UserError

SIZE = 16
SETTINGS = ValueFit(
    development_prompts=64, epochs=30, learning_rate=3e-3, heads=4, batch=16, lowest=-1.0, largest=3.0, seed=0
)


def make_prompts(n: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Return prompts of 2 to 9 noise tokens, one of which is of type a or b, and rewards: 0.25 for a, 2 for b."""
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


@pytest.fixture(scope="module")
def head() -> Any:
    """Return a head fitted on 64 prompts."""
    return fit_value_head(SETTINGS, *make_prompts(64, seed=0))


def test_fit_learns_which_of_two_tokens_occurs(head):
    """On prompts that it was not fitted on. Predicting the mean would leave the variance, 0.765625."""
    states, rewards = make_prompts(100, seed=1)
    values = predict_values(head, states)
    assert values.shape == (100,)
    assert values.dtype == torch.float32
    assert float((values - rewards).square().mean()) < 0.05
    assert float((rewards.mean() - rewards).square().mean()) == pytest.approx(0.765625)


def test_value_does_not_depend_on_the_other_prompts(head):
    states, _ = make_prompts(40, seed=2)
    together = predict_values(head, states)
    assert_close(together, torch.cat([predict_values(head, [part]) for part in states]), rtol=0, atol=1e-6)
    assert_close(together.flip(0), predict_values(head, states[::-1]), rtol=0, atol=1e-6)
    assert together.std() > 0.5
    assert predict_values(head, []).shape == (0,)


@pytest.mark.parametrize("filling", [0.0, 1e4, -7.0])
def test_padding_has_no_effect(head, filling):
    states, _ = make_prompts(12, seed=3)
    padded, mask = torch.full((12, 11, SIZE), filling), torch.zeros(12, 11, dtype=torch.bool)
    for i, part in enumerate(states):
        padded[i, : len(part)], mask[i, : len(part)] = part, True
    assert_close(head(padded, mask), predict_values(head, states), rtol=0, atol=1e-6)


def test_attention_equals_torch_multihead_attention(head):
    """torch's module with the same weights and a key padding mask gives the same attention."""
    torchs = torch.nn.MultiheadAttention(SIZE, SETTINGS.heads, batch_first=True)
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
    states, rewards = make_prompts(10, seed=0)
    rewards[0] = 3.0
    still = fit_value_head(replace(SETTINGS, epochs=1, learning_rate=1e-12), states, rewards)
    assert_close(predict_values(still, states), rewards.mean().expand(10), rtol=0, atol=1e-5)
    wild = fit_value_head(replace(SETTINGS, learning_rate=10.0, epochs=3), states, rewards)
    values = predict_values(wild, [1e4 * part for part in states])
    assert ((values >= -1) & (values <= 3)).all()


@pytest.mark.parametrize("reward", [-1.0, 3.0])
def test_rewards_all_at_an_end_of_the_range_can_be_fitted(reward):
    """Otherwise the sigmoid would start at infinity, where it has no slope."""
    states, _ = make_prompts(10, seed=0)
    rewards = torch.full((10,), reward)
    assert_close(predict_values(fit_value_head(SETTINGS, states, rewards), states), rewards, rtol=0, atol=0.05)


def test_epoch_of_least_training_error_is_kept():
    """At a learning rate where the error rises and falls, more epochs never increase it."""
    states, rewards = make_prompts(24, seed=5)
    rewards = rewards + torch.linspace(-1, 1, 24).roll(7)
    errors = []
    for epochs in range(1, 12):
        rough = fit_value_head(replace(SETTINGS, epochs=epochs, learning_rate=0.1), states, rewards)
        errors.append(float((predict_values(rough, states) - rewards).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) < len(errors)  # some epochs were worse and had no effect


def test_fit_depends_only_on_its_seed_and_keeps_the_global_generator():
    states, rewards = make_prompts(32, seed=0)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = predict_values(fit_value_head(SETTINGS, states, rewards), states)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    assert torch.equal(predict_values(fit_value_head(SETTINGS, states, rewards), states), first)
    other = fit_value_head(replace(SETTINGS, seed=1), states, rewards)
    assert not torch.equal(predict_values(other, states), first)


def test_states_from_inference_mode_can_be_fitted():
    with torch.inference_mode():
        states = [part.clone() for part in make_prompts(16, seed=0)[0]]
    assert states[0].is_inference()
    head = fit_value_head(replace(SETTINGS, epochs=1), states, make_prompts(16, seed=0)[1])
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert not head.training


OUTSIDE = r"outside loss\.value\.lowest=-1\.0 to loss\.value\.largest=3\.0"


@pytest.mark.parametrize(
    ("options", "reward", "state", "message"),
    [
        *[({}, reward, 0.0, OUTSIDE) for reward in (-1.5, 3.5, math.nan)],
        ({}, 0.0, math.inf, r"estimate is NaN: .* or loss\.value\.learning_rate is too high"),
        ({"heads": 5}, 0.0, 0.0, r"^loss\.value\.heads=5 does not divide the reference's hidden size 16$"),
    ],
)
def test_data_that_cannot_be_fitted_is_an_error(options, reward, state, message):
    states, rewards = make_prompts(32, seed=0)
    rewards[2], states[3][0, 0] = reward, state
    with pytest.raises(UserError, match=message):
        fit_value_head(replace(SETTINGS, **options), states, rewards)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({name: 0}, "loss.value: development_prompts, epochs, heads and batch must be at least 1, and "
                        "learning_rate above 0")
            for name in ("development_prompts", "epochs", "heads", "batch", "learning_rate")
        ],
        ({"lowest": 3.0}, "loss.value.lowest=3.0 must be below loss.value.largest=3.0"),
        ({"largest": math.nan}, "loss.value.lowest=-1.0 must be below loss.value.largest=nan"),
    ],
)  # fmt: skip
def test_wrong_settings_are_an_error(options, message):
    with pytest.raises(UserError) as error:
        replace(SETTINGS, **options)
    assert str(error.value) == message
