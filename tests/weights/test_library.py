"""`var.weights` as a library: the weights of a run, from any rewards."""

import pytest
import torch
from torch.testing import assert_close

from var import weights
from var.requirements import Weights
from var.utils.errors import UserError
from var.weights.estimators import compute_weights
from var.weights.inputs import WeightInputs

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.2, 0.9, 0.3])
PROMPT = torch.tensor([7, 7, 3, 3, 3, 11])  # any numbers


@pytest.mark.parametrize("unit", ["reward", "sd"])
@pytest.mark.parametrize(
    ("estimator", "more"),
    [
        (weights.Grouped(drop_zero_variance=False), {}),
        (weights.Global(), {}),
        (weights.Prompt(baseline="zero"), {}),
        (weights.Sampled(candidates=2), {"candidates": torch.tensor([[0.1, 0.4], [0.0, 1.0], [0.3, 0.3]])}),
    ],
)
def test_weights_are_those_of_a_run(estimator, more, unit):
    found = weights.weigh(estimator, REWARDS, PROMPT, 0.7, temperature_unit=unit, **more)
    requirement = Weights(estimator=estimator, temperature=0.7, temperature_unit=unit, min_weight=0.0)
    inputs = WeightInputs(
        rewards=REWARDS.double(), group=torch.tensor([1, 1, 0, 0, 0, 2]), length=torch.ones(6, dtype=torch.long),
        **{name: value.double() for name, value in more.items()},
    )  # fmt: skip
    assert_close(found, compute_weights(requirement, inputs), rtol=0, atol=0)
    assert found.mean().item() == pytest.approx(1)


def test_in_batch_weight_of_a_pair():
    """Mean log-probabilities 0 and −1 under both prompts, and rewards (1, 0; 0, 0), by hand."""
    cross = torch.tensor([[[0.0, -2.0], [0.0, -2.0]]])
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    found = weights.weigh(
        weights.InBatch(), torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), 0.5, length=torch.tensor([1, 2]),
        micro=torch.tensor([[0, 1]]), cross_rewards=rewards, cross_logps=cross,
    )  # fmt: skip
    own = torch.tensor([torch.sigmoid(torch.tensor(3.0)), torch.sigmoid(torch.tensor(-1.0))]).double()
    assert_close(found, own / own.mean(), atol=1e-7, rtol=0)


def test_what_is_missing_is_an_error():
    with pytest.raises(ValueError, match="candidates"):
        weights.weigh(weights.Sampled(), REWARDS, PROMPT, 1.0)
    with pytest.raises(ValueError, match="pass `length`"):
        weights.weigh(weights.InBatch(), REWARDS, PROMPT, 1.0)
    with pytest.raises(UserError, match="above 0"):
        weights.weigh(weights.Global(), REWARDS, PROMPT, 0.0)
    with pytest.raises(UserError, match="standard deviation within a prompt"):
        weights.weigh(weights.Global(), REWARDS, torch.arange(6), 1.0, temperature_unit="sd")


def test_lists_and_arrays_are_rewards_too():
    found = weights.weigh(weights.Global(), REWARDS.double(), PROMPT, 0.7)
    for rewards, prompt in ((REWARDS.tolist(), PROMPT.tolist()), (REWARDS.double().numpy(), PROMPT.numpy())):
        assert_close(weights.weigh(weights.Global(), rewards, prompt, 0.7), found, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rewards", "prompt", "message"),
    [
        ([1.0, 2.0], [0], r"one number per response, got shapes \[2\] and \[1\]"),
        ([[1.0, 2.0]], [[0, 0]], r"one number per response"),
        ([1.0, float("nan")], [0, 0], "reward 1 is NaN"),
    ],
)
def test_rewards_that_are_no_list_of_numbers_are_an_error(rewards, prompt, message):
    with pytest.raises(UserError, match=message):
        weights.weigh(weights.Global(), rewards, prompt, 1.0)
