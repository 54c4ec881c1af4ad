"""NCA on InfoNCA's groups: by hand, and its optimum over tables at β = 1 and at another β."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import (
    GROUP_LOGPS,
    POPULATION,
    VALUES,
    check_loss,
    find_optimum,
    make_batch,
    make_groups,
    value_and_gradient,
)
from var.losses.nca import NCA


def test_loss_matches_hand_computation():
    """α = 1/2: the target is 0.6652410, 0.0900306, 0.2447285 | 0.0024726, 0.9975274. β = 1/2: r_θ = 1, 0.25, −1 |
    1, 0.25. −target log σ(r_θ) − log σ(−r_θ)/K, with K = 3 | 2: 0.6461484 + 0.3271653 + 0.4258131 |
    0.6574054 + 0.9874850.

    A token has gradient β (σ(r_θ)/K − target σ(−r_θ))/2 groups: β/2 times 0.0647753, 0.1479747, −0.0892637 |
    0.3648643, −0.1556527.
    """
    a, b, c, d, e = (0.25 * x for x in (0.0647753447, 0.1479746664, -0.0892637077, 0.3648642985, -0.1556526761))
    value, gradient = (1.3991267837 + 1.6448904705) / 2, [a, a, b, c, d, d, e]
    metrics = check_loss(NCA(beta=0.5, temperature=0.5), make_groups(), value, gradient, GROUP_LOGPS, rtol=1e-8)
    target = (0.6652409558 + 0.25 * 0.0900305732 - 0.2447284711 + 0.0024726232 + 0.25 * 0.9975273768) / 2
    assert metrics == pytest.approx(
        {"nll": 13.5 / 7, "implicit_reward/mean": 1.5 / 5, "implicit_reward/target": target}
    )


def test_optimum_over_tables_is_the_tilted_reference_at_beta_1():
    """A normalized policy has r_θ = r/α − log Z: π_ref exp(r/α), normalized."""
    found = find_optimum(NCA(beta=1.0, temperature=0.7))
    assert_close(found, (POPULATION.log() + VALUES / 0.7).softmax(0), rtol=1e-7, atol=0)


def test_optimum_at_another_beta_is_only_near_the_tilted_reference():
    """With r_θ = r/α − log Z, exp(r_θ/β) does not sum to 1 under π_ref, so no policy has it."""
    found = find_optimum(NCA(beta=0.5, temperature=0.7))
    tilted = (POPULATION.log() + VALUES / (0.7 * 0.5)).softmax(0)
    assert 0.01 < float((found - tilted).abs().max()) < 0.2


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_gradient_is_zero_only_at_the_absolute_target(shift):
    """K = 4, every response once, uniform reference: the gradient is 0 at r_θ = r/α − log mean exp(r/α), and nowhere
    else. A constant of the prompt, which InfoNCA ignores, has a slope here."""
    target = VALUES / 0.7 - (VALUES / 0.7).exp().mean().log()
    reference = torch.full((4,), 0.25).double().log()
    batch = make_batch([1] * 4, group=[0] * 4, reference_logps=reference, rewards=VALUES)
    loss, logps = NCA(beta=0.5, temperature=0.7), target / 0.5 + shift - math.log(4)
    _, gradient = value_and_gradient(lambda x: loss(x, batch)[0], logps)
    assert (float(gradient.abs().max()) < 1e-15) == (shift == 0)


def test_group_of_one_response_stays_at_the_reference():
    """K = 1: −log σ(r_θ) − log σ(−r_θ) is flat at r_θ = 0, where it is 2 log 2."""
    logps = torch.tensor([-1.0, -2.0])
    batch = make_batch([2], group=[0], reference_logps=logps, rewards=[7.0])
    value, gradient = value_and_gradient(lambda x: NCA(beta=0.5, temperature=0.1)(x, batch)[0], logps)
    assert value.item() == pytest.approx(2 * math.log(2))
    assert_close(gradient, torch.zeros(2))
