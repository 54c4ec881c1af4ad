"""InfoNCA: by hand, DPO as its limit, and its optimum over tables."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.groups import GROUP_LOGPS, GROUP_METRICS, POPULATION, VALUES, find_optimum, make_groups
from tests.helpers.losses import check_loss, double, make_batch, value_and_gradient
from var.losses.dpo import DPO
from var.losses.infonca import InfoNCA


def test_loss_matches_hand_computation():
    """α = 1/2: r/α = 2, 0, 1 | 0, 6, so the target is 0.6652410, 0.0900306, 0.2447285 | 0.0024726, 0.9975274. β = 1/2:
    r_θ = 1, 0.25, −1 | 1, 0.25 has the softmax 0.6220059, 0.2938148, 0.0841793 | 0.6791787, 0.3208213. The
    cross-entropies are 1.0317856 and 1.1350165. A token has gradient β (softmax − target)/2 groups."""
    a, b, c, d = (0.25 * x for x in (-0.0432350728, 0.2037842015, -0.1605491287, 0.6767060760))
    value, gradient = (1.0317856002 + 1.1350165387) / 2, [a, a, b, c, d, d, -d]
    loss = InfoNCA(beta=0.5, temperature=0.5)
    metrics = check_loss(loss, make_groups(), value, gradient, GROUP_LOGPS, rtol=1e-8)
    assert metrics == pytest.approx(GROUP_METRICS)


@pytest.mark.parametrize(("gap", "smoothing"), [(math.log(4), 0.2), (1e4, 0.0)])
def test_pair_is_dpo_with_the_target_as_label_smoothing(gap, smoothing):
    """K = 2: the target of the worse response is σ(−Δr/α), which is 0.2 at Δr = α log 4. As Δr grows the loss becomes
    DPO's."""
    torch.manual_seed(0)
    logps, reference = -torch.rand(2, 9, dtype=torch.float64)
    rewards = 0.7 * double([5 + gap, 5.0, gap - 3, -3.0])
    batch = make_batch([2, 3, 3, 1], [0, 0, 1, 1], global_groups=2.0, reference_logps=reference, rewards=rewards)
    found, _ = InfoNCA(beta=0.6, temperature=0.7)(logps, batch)
    assert_close(found, DPO(beta=0.6, label_smoothing=smoothing)(logps, batch)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_optimum_over_tables_is_the_tilted_reference(beta):
    """π_ref exp(r/(αβ)), normalized, for any β and responses drawn from π_ref."""
    found = find_optimum(InfoNCA(beta=beta, temperature=0.7))
    assert_close(found, (POPULATION.log() + VALUES / (0.7 * beta)).softmax(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("draws", [[0, 3], [2, 1, 1], [0, 1, 2, 3, 3]])
def test_gradient_at_the_optimum_is_zero_in_groups_of_any_size(draws):
    """At log π_θ/π_ref = r/(αβ) plus a constant, target and softmax agree in every group, however it was drawn."""
    logps = (POPULATION.log() + VALUES / (0.7 * 0.5)).log_softmax(0)[draws]
    group, reference = [0] * len(draws), POPULATION.log()[draws]
    batch = make_batch([1] * len(draws), group, reference_logps=reference, rewards=VALUES[draws])
    _, gradient = value_and_gradient(lambda x: InfoNCA(beta=0.5, temperature=0.7)(x, batch)[0], logps)
    assert_close(gradient, torch.zeros(len(draws), dtype=torch.float64), rtol=0, atol=1e-15)


def test_large_rewards_and_a_small_temperature_do_not_overflow():
    """r/α = 8e4 in float32: the target is the better response alone. A group of one has loss and gradient 0."""
    batch = make_batch([1, 1, 1], group=[0, 0, 1], reference_logps=[0.0, 0.0, 0.0], rewards=[8.0, 7.5, 9.0])
    loss = InfoNCA(beta=1.0, temperature=1e-4)
    value, gradient = value_and_gradient(lambda x: loss(x, batch)[0], torch.tensor([-1.0, -2.0, -3.0]))
    assert value.item() == pytest.approx(math.log1p(math.exp(-1)))
    assert_close(gradient, torch.tensor([-0.26894143, 0.26894143, 0.0]))
