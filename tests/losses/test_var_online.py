"""VAR on sampled groups: weights by hand, zero-variance groups, and the target of repeated rollouts."""

import itertools
import math
from typing import Any

import pytest
from torch import Tensor

from tests.helpers.losses import check_loss, compute_loss, double, make_batch, value_and_gradient
from var.losses.var_online import VAROnline
from var.models.packing import Packed

# Two groups: of three responses (2 tokens, 1, 1) with e^{r/λ} = 1, 2, 5 at λ = 2, and of two (1, 2) with equal rewards.
REWARDS = [0.0, 2 * math.log(2), 2 * math.log(5), 0.1, 0.1]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -0.5]


def make_rollout(**fields: Any) -> Packed:
    """Return the two groups."""
    return make_batch([2, 1, 1, 1, 2], group=[0, 0, 0, 1, 1], **{"rewards": double(REWARDS), **fields})


@pytest.mark.parametrize(
    ("options", "total", "equal", "divisor"),
    [({}, 9.75, 0.0, 14.0), ({"drop_zero_variance": False, "normalize": "sequence"}, 12.75, 1.0, 6.0)],
)
def test_loss_matches_hand_computation(options, total, equal, divisor):
    """Weights 3·(1, 2, 5)/8 = 0.375, 0.75, 1.875 give 0.375·3 + 0.75·4 + 1.875·3 = 9.75. The group of equal rewards has
    weight 0, or weight 1 if it is kept, which adds 1 + 2. The step has 14 tokens and 6 sequences."""
    weights = [0.375, 0.375, 0.75, 1.875, equal, equal, equal]
    batch = make_rollout(global_tokens=14.0, global_sequences=6.0)
    gradient = [-weight / divisor for weight in weights]
    metrics = check_loss(VAROnline(temperature=2.0, **options), batch, total / divisor, gradient, LOGPS)
    assert metrics == pytest.approx(
        {
            "nll": 13 / 7, "reward/mean": sum(REWARDS) / 5, "groups/zero_variance": 0.5,
            "weight/mean": 0.6 + 0.4 * equal, "weight/square": (0.375**2 + 0.75**2 + 1.875**2 + 2 * equal) / 5,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "samples", "stationary"),
    [
        ([1, 1, 1], [0, 0, 1, 2], True),
        ([2, 1, 1], [0, 0, 1, 2], False),
        ([1, 2, 2], [0, 1, 2], True),
        ([1, 1, 1], [0, 1, 2], False),
    ],
)
def test_two_rollouts_aim_at_twice_the_reward(policy, samples, stationary):
    """Three responses of one token, π_ref = 1/2, 1/4, 1/4, e^{r/λ} = 1, 2, 2. On four samples in these proportions the
    loss is stationary at π_ref e^{r/λ} ∝ 1, 1, 1. On three samples of that policy it is stationary at
    π_ref e^{2r/λ} ∝ 1, 2, 2."""
    rewards = double([0.0, math.log(2), math.log(2)])
    batch = make_batch([1] * len(samples), group=[0] * len(samples), rewards=rewards[samples])
    logits = double(policy).log()
    _, gradient = value_and_gradient(lambda x: VAROnline()(x.log_softmax(0)[samples], batch)[0], logits)
    assert (gradient.abs().max() < 1e-15) == stationary
    assert (gradient.abs().max() > 0.1) != stationary


def test_baseline_subtracts_the_mean_weight_of_the_group():
    """Weights −0.625, −0.25, 0.875, and 0 for the group of equal rewards, with whichever weight it has. The logged
    weights are those before the baseline."""
    batch = make_rollout(global_tokens=14.0)
    gradient = [-weight / 14 for weight in (-0.625, -0.625, -0.25, 0.875, 0.0, 0.0, 0.0)]
    value = (-0.625 * 3 - 0.25 * 4 + 0.875 * 3) / 14
    metrics = check_loss(VAROnline(temperature=2.0, baseline=True), batch, value, gradient, LOGPS)
    assert metrics["weight/mean"] == pytest.approx(0.6)
    check_loss(VAROnline(temperature=2.0, baseline=True, drop_zero_variance=False), batch, value, gradient, LOGPS)


def sum_over_groups(loss: VAROnline, policy: list[int]) -> Tensor:
    """Return the sum of the gradients in a policy's logits over all groups of two of four samples.

    The samples are of three responses, of 1, 3 and 1 tokens, which have equal shares of the response's log-probability.
    """
    rewards, lengths, logits = double([0.0, 0.3, 1.0]), double([1, 3, 1]), double(policy).log().requires_grad_(True)
    for pair in itertools.product([0, 0, 1, 2], repeat=2):
        drawn = list(pair)
        batch = make_batch(lengths[drawn].int().tolist(), group=[0, 0], rewards=rewards[drawn])
        logps = (logits.log_softmax(0) / lengths)[drawn][batch.sequence]
        loss(logps, batch)[0].backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize(
    ("policy", "options", "same"),
    [
        ([2, 1, 1], {}, True),
        ([1, 1, 1], {}, False),
        ([2, 1, 1], {"normalize": "token"}, False),
        ([2, 1, 1], {"drop_zero_variance": True}, False),
    ],
)
def test_baseline_keeps_the_expected_gradient_on_own_responses(policy, options, same):
    """Four samples represent the policy 1/2, 1/4, 1/4 exactly, and no other. A divisor of tokens is larger in groups
    with the long response, and groups that are dropped for their equal rewards are not a fair sample."""
    settings = {"normalize": "sequence", "drop_zero_variance": False, **options}
    plain, centered = (sum_over_groups(VAROnline(baseline=b, **settings), policy) for b in (False, True))
    assert bool((plain - centered).abs().max() < 1e-14) == same


def test_small_temperature_does_not_overflow():
    """λ = 1e-4: e^{r/λ} is infinite, the weights are 3, 0, 0."""
    value, _, _ = compute_loss(VAROnline(temperature=1e-4), make_rollout(rewards=[1.0, 0.0, 0.5, 0.0, 0.0]), LOGPS)
    assert value == pytest.approx(3 * 3 / 7)
