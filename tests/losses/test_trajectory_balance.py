"""Trajectory balance: by hand, its limits and relatives, its optimum, and its gradient on own responses."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers.groups import DRAWS, GROUP_LOGPS, POPULATION, VALUES, find_optimum, make_groups
from tests.helpers.losses import check_loss, compute_loss, double, make_batch, value_and_gradient
from var.losses.ipo import IPO
from var.losses.trajectory_balance import TrajectoryBalance

ALPHAS = [0.0, 0.3, 1.0]


def test_half_the_variance_matches_hand_computation():
    """λ = 1/2: Δ = 0, 0.5, −3 | 2, −5.5 with means −5/6 and −1.75. The variances are 86/36 and 14.0625. A token has
    gradient (Δ − mean)/K/2 groups."""
    value = (86 / 36 / 2 + 14.0625 / 2) / 2
    a, b, c, d = 5 / 36, 8 / 36, -13 / 36, 3.75 / 4
    metrics = check_loss(TrajectoryBalance(temperature=0.5), make_groups(), value, [a, a, b, c, d, d, -d], GROUP_LOGPS)
    assert metrics["balance/variance"] == pytest.approx((86 / 36 + 14.0625) / 2)
    assert metrics["implicit_reward/mean"] == pytest.approx(1.5 / 5)


def test_alpha_zero_weights_tokens_by_the_corrected_softmax_minus_one_in_K():
    """λ = 1/2: softmax(−Δ) of 0, −0.5, 3 | −2, 5.5, minus 1/3 or 1/2, over two groups."""
    batch, loss = make_groups(), TrajectoryBalance(temperature=0.5, alpha=0.0)
    value, gradient, _ = compute_loss(loss, batch, GROUP_LOGPS)
    first = [math.exp(x) for x in (0, -0.5, 3)]
    second = [math.exp(x) for x in (-2, 5.5)]
    parts = [sum(first) / 3, sum(second) / 2]
    assert value == pytest.approx((math.log(parts[0]) + math.log(parts[1]) - 2.5 / 3 - 1.75) / 2)
    weights = [x / sum(first) - 1 / 3 for x in first] + [x / sum(second) - 1 / 2 for x in second]
    assert_close(gradient, -double(weights)[batch.sequence] / 2, rtol=1e-12, atol=0)


def test_small_kappa_tends_to_half_the_variance():
    batch = make_groups()
    limit = compute_loss(TrajectoryBalance(temperature=0.5), batch, GROUP_LOGPS)
    near = compute_loss(TrajectoryBalance(temperature=0.5, alpha=1 - 1e-5), batch, GROUP_LOGPS)
    assert near[0] == pytest.approx(limit[0], rel=1e-4)
    assert_close(near[1], limit[1], rtol=1e-3, atol=1e-6)
    single = batch._with(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    value, _ = TrajectoryBalance(temperature=0.5, alpha=0.999)(torch.tensor(GROUP_LOGPS), single)
    assert value.item() == pytest.approx(limit[0], rel=1e-2)  # 1/κ² is a million
    assert value.dtype == torch.float32


def test_a_pair_is_an_eighth_of_ipo():
    """At Δr/λ = 1/(2β) for every pair, half the variance of two numbers is an eighth of their squared difference."""
    rewards = double([1.5, 0.25, 0.0, -1.25])
    batch = make_batch(
        [2, 1, 1, 2], [0, 0, 1, 1], rewards=rewards, global_groups=2.0,
        reference_logps=double([-2.0, -3.0, -4.5, -1.0, -2.0, -2.5]),
    )  # fmt: skip
    logps = double([-1.0, -2.0, -4.0, -3.0, -1.0, -1.5])
    found = value_and_gradient(lambda x: TrajectoryBalance(temperature=0.5)(x, batch)[0], logps)
    value, gradient = value_and_gradient(lambda x: IPO(beta=0.2)(x, batch)[0], logps)
    assert_close(found, (value / 8, gradient / 8), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_optimum_over_tables_is_the_tilted_reference(alpha):
    found = find_optimum(TrajectoryBalance(temperature=0.7, alpha=alpha))
    assert_close(found, (POPULATION.log() + VALUES / 0.7).softmax(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("draws", [[0, 3], [2, 1, 1], [0, 1, 2, 3, 3], [1]])
def test_loss_and_gradient_at_the_optimum_are_zero_for_responses_of_any_policy(alpha, draws):
    logps = (POPULATION.log() + VALUES / 0.7).log_softmax(0)[draws]
    batch = make_batch(
        [1] * len(draws), [0] * len(draws), reference_logps=POPULATION.log()[draws], rewards=VALUES[draws]
    )
    loss = TrajectoryBalance(temperature=0.7, alpha=alpha)
    value, gradient = value_and_gradient(lambda x: loss(x, batch)[0], logps)
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def divergence(alpha: float, log_policy: Tensor, log_target: Tensor) -> Tensor:
    """Return the α-divergence (1 − Σ π^α π*^(1−α)) / (α (1 − α)) and its limits, the two KLs."""
    if alpha == 1:
        return (log_policy.exp() * (log_policy - log_target)).sum()
    if alpha == 0:
        return (log_target.exp() * (log_target - log_policy)).sum()
    return (1 - (alpha * log_policy + (1 - alpha) * log_target).exp().sum()) / (alpha * (1 - alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_on_own_responses_is_that_of_the_divergence(alpha):
    """Eight draws represent the policy exactly. Between the KLs the constant that is fitted in place of log Z scales
    the gradient, and leaves its direction."""
    reference = double([0.1, 0.2, 0.3, 0.4]).log()
    target = (reference + VALUES / 0.7).log_softmax(0)
    rewards = VALUES[DRAWS]
    batch = make_batch([1] * 8, [0] * 8, reference_logps=reference[DRAWS], rewards=rewards)
    loss = TrajectoryBalance(temperature=0.7, alpha=alpha)
    _, found = value_and_gradient(lambda x: loss(x.log_softmax(0)[DRAWS], batch)[0], POPULATION.log())
    _, expected = value_and_gradient(lambda x: divergence(alpha, x.log_softmax(0), target), POPULATION.log())
    scale = found.norm() / expected.norm()
    assert_close(found, scale * expected, rtol=1e-9, atol=1e-12)
    if alpha in (0, 1):
        assert scale.item() == pytest.approx(1)
