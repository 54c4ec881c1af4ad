"""V(x), the cross-fitted regression of the reward on the prompt, and statistics of rewards and weights."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import double
from tests.helpers.weights import make_inputs
from var.weights.groups import within_prompt_std
from var.weights.health import weight_health
from var.weights.prompt_values import prompt_values


def test_few_prompts_have_the_mean_of_the_other_prompts():
    """Rewards 1, 3 | 5 | 9: prompt means 2, 5, 9, so V = 7, 5.5, 3.5. A prompt without a sequence: the mean, 16/3."""
    inputs = make_inputs([1, 3, 5, 9], group=[0, 0, 1, 2], features=torch.zeros(4, 2))
    assert_close(prompt_values(inputs), double([7, 5.5, 3.5, 16 / 3]))
    assert prompt_values(make_inputs([4.0], features=torch.zeros(1, 2))).tolist() == [0.0]


def test_planted_signal_is_found_on_held_out_prompts():
    """Mean reward = 2x₀ + noise of 1/2: R² of V is near 4/4.25, and the signal itself has correlation 0.97."""
    torch.manual_seed(0)
    features = torch.randn(200, 12)
    group = torch.arange(200).repeat_interleave(2)
    rewards = 5 + 2 * features[group, 0].double() + 0.5 * torch.randn(200).double()[group]
    rewards = rewards + double([3.0, -3.0]).repeat(200)  # within the prompt, so V cannot explain it
    values = prompt_values(make_inputs(rewards, group=group.tolist(), features=features))
    own = rewards.view(-1, 2).mean(1)
    assert float(1 - (own - values).square().mean() / own.var()) > 0.9


def test_value_does_not_depend_on_its_own_prompt_rewards():
    """Changing the reward of one prompt changes the values of others, never its own."""
    torch.manual_seed(1)
    features, rewards = torch.randn(60, 5), torch.randn(60).double()
    before = prompt_values(make_inputs(rewards, features=features))
    for prompt in (0, 31, 59):
        after = prompt_values(make_inputs(rewards + 50 * (torch.arange(60) == prompt), features=features))
        assert after[prompt] == before[prompt]
        assert int((after != before).sum()) >= 50


@pytest.mark.parametrize("seed", range(5))
def test_noise_features_do_not_remove_the_signal(seed):
    """Fitted on the same rows, 50 features would explain half of 100 rewards. Cross-fitted they explain nothing: the
    correlation with the own reward is not positive beyond chance, and r − V keeps the standard deviation of r."""
    torch.manual_seed(seed)
    rewards = torch.randn(100).double()
    values = prompt_values(make_inputs(rewards, features=torch.randn(100, 50)))
    assert float(torch.corrcoef(torch.stack([rewards, values]))[0, 1]) < 0.1
    assert float((rewards - values).std() / rewards.std()) > 0.95


def test_values_are_finite_with_more_features_than_prompts():
    torch.manual_seed(0)
    features = torch.cat([torch.randn(30, 100), torch.ones(30, 1)], 1)
    assert bool(prompt_values(make_inputs(torch.randn(30).double(), features=features)).isfinite().all())


def test_standard_deviation_within_prompts_is_pooled_and_unbiased():
    """0, 2 and 1, 1, 4 (and a single response): squares 2 + 6 over 1 + 2 degrees of freedom, √(8/3)."""
    group = torch.tensor([0, 1, 0, 1, 1, 2])
    assert within_prompt_std(double([0, 1, 2, 1, 4, 77]), group) == pytest.approx(1.632993161855452, rel=1e-14)
    assert within_prompt_std(double([0, 1]), torch.tensor([0, 1])) is None


def test_weight_health_matches_hand_computation():
    """w = 1, 1, 2, 0 and lengths 1 to 4: (Σw)²/Σw²/n = 16/24, largest 2, a quarter below 1e-3, correlation −1/√10. The
    statistics do not depend on the scale of the weights."""
    found = weight_health(double([1, 1, 2, 0]), torch.tensor([1, 2, 3, 4]))
    assert found == pytest.approx((2 / 3, 2.0, 0.25, -0.31622776601683794))
    scaled = weight_health(double([8, 8, 16, 0.0079]), torch.tensor([1, 2, 3, 4]))
    assert scaled == pytest.approx(found, abs=1e-3)
    assert weight_health(double([1, 1]), torch.tensor([3, 9])) == (1.0, 1.0, 0.0, 0.0)
