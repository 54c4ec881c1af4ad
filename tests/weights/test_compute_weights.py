"""The weights that train: mean 1, the temperature and its unit, and which responses are left out."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import double
from tests.helpers.weights import make_inputs, require_weights, weigh
from var.utils.errors import UserError
from var.weights.estimators import (
    Global,
    Grouped,
    InBatch,
    Prompt,
    Value,
    compute_weights,
    normalize_log_weights,
    play_roulette,
    scale_temperature,
)
from var.weights.groups import within_prompt_std

LOGS = [0.0, math.log(2), math.log(9)]


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("estimator", [Grouped(drop_zero_variance=False), Global(), Prompt(baseline="zero"), Value()])
def test_weights_have_mean_1_at_any_temperature(estimator, temperature):
    torch.manual_seed(0)
    rewards = torch.randn(24).double()
    inputs = make_inputs(rewards, group=[i // 2 for i in range(24)], features=torch.randn(12, 2))
    weights = weigh(estimator, inputs, temperature)
    assert weights.dtype == torch.float64
    assert bool((weights >= 0).all())
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("estimator", [InBatch(), InBatch(reference="own"), InBatch(reduction="none")])
def test_weights_of_some_micro_batches_at_a_time_are_the_same(estimator, monkeypatch):
    torch.manual_seed(0)
    inputs = make_inputs(
        torch.randn(14).double(), group=list(range(14)), micro=torch.tensor([*range(14), -1, -1]).view(4, 4),
        cross_rewards=torch.randn(4, 4, 4).double(), cross_logps=torch.randn(4, 4, 4).double(),
        reference_logps=torch.randn(14).double(),
    )  # fmt: skip
    expected = weigh(estimator, inputs, 0.5)
    monkeypatch.setattr("var.weights.estimators.AT_ONCE", 1)
    assert torch.equal(weigh(estimator, inputs, 0.5), expected)


@pytest.mark.parametrize("scale", [1e4, 1e7])
@pytest.mark.parametrize(
    "estimator",
    [
        InBatch(), InBatch(reduction="sum"), InBatch(reference="own"),
        Grouped(drop_zero_variance=False), Prompt(), Prompt(baseline="zero"),
        Value(), Global(),
    ],
)  # fmt: skip
def test_huge_rewards_over_a_small_temperature_stay_finite(estimator, scale):
    """r/λ up to ±1e9 neither overflows nor gives 0/0. The mean is 1 over the rows that train; rows whose weight
    underflows do not, except in a fixed micro-batch."""
    torch.manual_seed(0)
    rewards = torch.cat([torch.tensor([scale, -scale]), scale * torch.randn(14)]).double()
    inputs = make_inputs(
        rewards, group=[i // 2 for i in range(16)], features=torch.zeros(8, 1), micro=torch.arange(16).view(2, 8),
        cross_rewards=rewards.view(2, 1, 8).repeat(1, 8, 1), cross_logps=-1e4 * torch.rand(2, 8, 8).double(),
        reference_logps=-rewards.abs(),
    )  # fmt: skip
    found = weigh(estimator, inputs, 0.01)
    assert bool(found.isfinite().all())
    kept = found if estimator.needs_plan else found[found > 0]
    assert_close(kept.mean().item(), 1.0, rtol=1e-6, atol=0)


def test_normalization_takes_the_mean_over_kept_weights():
    """1, 3 and an absent weight have mean 2, not 4/3. If nothing is kept, nothing changes."""
    assert_close(normalize_log_weights(double([1, 3, 0]).log()).exp(), double([0.5, 1.5, 0]))
    assert normalize_log_weights(double([-math.inf, -math.inf])).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    ("estimator", "settings", "rewards", "expected"),
    [
        pytest.param(Global(), {"temperature": 1e9}, [-3.0, 0.0, 5.0], [1.0, 1.0, 1.0], id="large_temperature_is_sft"),
        # e^−1000 = 0 in float64.
        pytest.param(
            Grouped(drop_zero_variance=False),
            {},
            [0.0, 1000.0, 0.0, 0.0],
            [0.0, 1.5, 0.75, 0.75],
            id="underflow_does_not_train",
        ),
        # e^{r/λ} = 1, 2, 9 has the weights 0.25, 0.5, 2.25.
        pytest.param(Global(), {"min_weight": 0.2}, LOGS, [0.25, 0.5, 2.25], id="all_above_min_weight"),
        # Only the first is below the minimum: 2 and 9 over their mean 5.5.
        pytest.param(Global(), {"min_weight": 0.499999}, LOGS, [0.0, 4 / 11, 18 / 11], id="below_min_weight"),
    ],
)
def test_weights_that_train_have_mean_1(estimator, settings, rewards, expected):
    inputs = make_inputs(rewards, [i // 2 for i in range(len(rewards))])
    assert_close(weigh(estimator, inputs, **settings), double(expected), rtol=1e-7, atol=1e-8)


def test_roulette_keeps_the_expectation_and_raises_small_weights():
    """Weights 0.3, 1.2, 2.5 and 0 with a minimum of 1: the first survives three draws of ten, and then counts 1."""
    weights, draws = double([0.3, 1.2, 2.5, 0.0]), torch.arange(10).double() / 10
    found = torch.stack([play_roulette(weights, 1.0, draw.expand(4)) for draw in draws])
    assert_close(found.mean(0), weights)
    assert found[:, 0].tolist() == [1.0] * 3 + [0.0] * 7
    assert bool(((found == 0) | (found >= 1)).all())


@pytest.mark.parametrize("least", [0.0, 0.5, 1.5, 4.0])
def test_variance_of_a_step_after_roulette(least):
    """docs/method.md, small weights: E[w'²]/E[w']² over the remaining weights is p E[w max(w, m)]/E[w]². At m = 4, the
    largest of the weights 4, 1, 0.5 and 0.1, no variance is left."""
    weights, draws = double([4.0, 1.0, 0.5, 0.1]), (torch.arange(1000).double() + 0.5) / 1000
    found = torch.cat([play_roulette(weights, least, draw.expand(4)) for draw in draws])
    left = found[found > 0]
    kept = (weights / max(least, 1e-9)).clamp(max=1).mean()
    expected = kept * (weights * weights.clamp(min=least)).mean() / weights.mean().square()
    assert_close(left.square().mean() / left.mean().square(), expected, rtol=1e-2, atol=0)
    if least == 4.0:
        assert left.square().mean() / left.mean().square() == pytest.approx(1.0)


def test_weights_after_roulette_have_mean_1_over_those_that_train():
    """e^{r/λ} = 1, 2, 9 has the weights 0.25, 0.5, 2.25. With draws of 0.2, 0.6 and 0.9, the first becomes 1 and the
    second 0, so 1 and 2.25 remain, of mean 1.625."""
    inputs, requirement = make_inputs(LOGS), require_weights(Global(), temperature=1.0, min_weight=1.0, roulette=True)
    found = compute_weights(requirement, inputs, double([0.2, 0.6, 0.9]))
    assert_close(found, double([1, 0, 2.25]) / 1.625)


def test_temperature_in_units_of_the_standard_deviation():
    """Rewards 0, 2 | 5, 7: σ = √2. λ = 2σ = 2√2 in reward units, so the better response of a pair has weight
    2σ(2/(2√2)) = 1.3395, and scaling all rewards changes nothing."""
    inputs = make_inputs([0.0, 2.0, 5.0, 7.0], [0, 0, 1, 1])
    settings = {"temperature": 2.0, "temperature_unit": "sd"}
    assert scale_temperature(require_weights(Grouped(drop_zero_variance=False), **settings), inputs) == pytest.approx(
        2 * math.sqrt(2)
    )
    assert scale_temperature(require_weights(Grouped(drop_zero_variance=False), temperature=2.0), inputs) == 2.0
    weights = weigh(Grouped(drop_zero_variance=False), inputs, **settings)
    assert weights[1].item() == pytest.approx(2 / (1 + math.exp(-1 / math.sqrt(2))))
    assert_close(
        weigh(Grouped(drop_zero_variance=False), replace(inputs, rewards=40 * inputs.rewards), **settings), weights
    )


EQUAL = (
    "loss.temperature_unit=sd: the rewards of each prompt's responses are all equal, so their standard deviation is "
    "0. Use several different responses per prompt (data.responses=both or all, generate.responses), other prompts or "
    "another reward, or set loss.temperature_unit=reward."
)
SINGLE = (
    "loss.temperature_unit=sd: each prompt has one response, so the standard deviation within a prompt is "
    "undefined. For single responses use loss=var_prompt loss.temperature_unit=reward. Otherwise give several "
    "responses per prompt, or sample them with data.responses=sampled."
)


@pytest.mark.parametrize(
    ("rewards", "group", "message"),
    [([0.0, 2.0], [0, 1], SINGLE), ([1.0, 1.0], [0, 0], EQUAL), ([0.1] * 3, [0] * 3, EQUAL)],
)
def test_absent_or_zero_standard_deviation_is_an_error(rewards, group, message):
    with pytest.raises(UserError) as error:
        weigh(Grouped(drop_zero_variance=False), make_inputs(rewards, group), temperature_unit="sd")
    assert str(error.value) == message


@pytest.mark.parametrize("noise", [1e-12, 1e-15])
@pytest.mark.parametrize("size", [0.7, 1e6])
def test_standard_deviation_of_rounding_noise_is_an_error(noise, size):
    rewards = size * (1 + noise * double([1, -1, 0, 1]))
    with pytest.raises(UserError) as error:
        weigh(Grouped(drop_zero_variance=False), make_inputs(rewards, [0, 0, 1, 1]), temperature_unit="sd")
    sigma = within_prompt_std(rewards, torch.tensor([0, 0, 1, 1]))
    assert str(error.value) == (
        f"loss.temperature_unit=sd: the standard deviation of the rewards within a prompt is {sigma:.3g}, which is "
        f"rounding error for rewards of size {size:.3g}. Use other prompts or another reward, or set "
        "loss.temperature_unit=reward."
    )


@pytest.mark.parametrize(
    "rewards", [[1e6, 1e6 + 1e-3, 1e6, 1e6], [1e-8, -1e-8, 0.0, 0.0], [1e-8, -1e-8, 1e9, 1e9], [0.7, 0.7 + 6e-8, 0, 0]]
)
def test_small_but_real_standard_deviation_is_accepted(rewards):
    """A small difference at a large size, small rewards, a large zero-variance group, and float32's resolution."""
    weights = weigh(Grouped(drop_zero_variance=False), make_inputs(rewards, [0, 0, 1, 1]), temperature_unit="sd")
    assert float(weights[:2].max() / weights[:2].min()) == pytest.approx(math.exp(2), rel=1e-6)  # σ = Δr/2
