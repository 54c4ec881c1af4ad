"""NCA on InfoNCA's groups: by hand, and its optimum over tables at β = 1 and at another β."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.groups import GROUP_LOGPS, GROUP_METRICS, POPULATION, VALUES, find_optimum, make_groups
from tests.helpers.losses import check_loss, make_batch, value_and_gradient
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
    assert metrics == pytest.approx(GROUP_METRICS)


@pytest.mark.parametrize(("beta", "least", "most"), [(1.0, 0.0, 1e-7), (0.5, 0.01, 0.2)])
def test_optimum_over_tables_is_the_tilted_reference_only_at_beta_1(beta, least, most):
    """At β = 1 a normalized policy has r_θ = r/α − log Z. At another β, exp(r_θ/β) of these r_θ does not sum to 1 under
    π_ref, so no policy has them and the optimum is only near π_ref exp(r/(αβ))."""
    tilted = (POPULATION.log() + VALUES / (0.7 * beta)).softmax(0)
    distance = float((find_optimum(NCA(beta=beta, temperature=0.7)) - tilted).abs().max())
    assert least <= distance < most


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
