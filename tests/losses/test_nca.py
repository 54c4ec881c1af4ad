"""NCA on InfoNCA's groups: values and gradients by hand, its optimum over tables at β = 1 and elsewhere."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from tests.losses.test_infonca import LOGPS, POPULATION, VALUES, group_batch, optimum
from var.losses.nca import NCA
from var.requirements import Groups, ReferenceLogps, Rewards
from var.utils.errors import UserError

LOSS = NCA(beta=0.5, temperature=0.5)


def test_loss_and_gradient_by_hand(batch_of):
    """α = 1/2: target 0.6652410, 0.0900306, 0.2447285 | 0.0024726, 0.9975274. β = 1/2: r_θ = 1, 0.25, −1 | 1, 0.25.
    −target log σ(r_θ) − log σ(−r_θ)/K, K = 3 | 2: 0.6461484 + 0.3271653 + 0.4258131 | 0.6574054 + 0.9874850.

    Gradient of a token: β (σ(r_θ)/K − target σ(−r_θ))/2 groups: 0.0647753, 0.1479747, −0.0892637 | 0.3648643,
    −0.1556527 times β/2.
    """
    value, gradient, metrics = loss_and_gradient(LOSS, group_batch(batch_of), LOGPS)
    assert value == pytest.approx((1.3991267837 + 1.6448904705) / 2, rel=1e-9)
    a, b, c, d, e = (0.25 * x for x in (0.0647753447, 0.1479746664, -0.0892637077, 0.3648642985, -0.1556526761))
    assert_close(gradient, torch.tensor([a, a, b, c, d, d, e], dtype=torch.float64), rtol=1e-8, atol=0)
    target = (0.6652409558 + 0.25 * 0.0900305732 - 0.2447284711 + 0.0024726232 + 0.25 * 0.9975273768) / 2
    expected = {"nll": 13.5 / 7, "implicit_reward/mean": 1.5 / 5, "implicit_reward/target": target}
    assert metrics == pytest.approx(expected)


def test_its_optimum_over_tables_is_the_reference_tilted_at_beta_1(batch_of):
    """π_ref exp(r/α) normalised: r_θ = r/α − log Z is met by a normalised policy."""
    found = optimum(NCA(beta=1.0, temperature=0.7), batch_of)
    assert_close(found, (POPULATION.log() + VALUES / 0.7).softmax(0), rtol=1e-7, atol=0)


def test_at_another_beta_its_optimum_is_only_near_the_reference_tilted(batch_of):
    """exp(r_θ/β) of r_θ = r/α − log Z does not sum to 1 under π_ref: no policy has it."""
    found = optimum(NCA(beta=0.5, temperature=0.7), batch_of)
    tilted = (POPULATION.log() + VALUES / (0.7 * 0.5)).softmax(0)
    assert 0.01 < float((found - tilted).abs().max()) < 0.2


def test_the_whole_response_set_under_a_uniform_reference_is_flat_at_r_over_alpha_less_log_z(batch_of):
    """K = 4, every response once: the gradient is 0 at r_θ = r/α − log mean exp(r/α), and only there: a constant of
    the prompt, which InfoNCA does not see, has a slope here."""
    target = VALUES / 0.7 - (VALUES / 0.7).exp().mean().log()
    for shift in (0.0, 0.1):
        logps = (target / 0.5 + shift - math.log(4)).requires_grad_(True)
        batch = batch_of([1] * 4, group=[0] * 4, reference_logps=torch.full((4,), 0.25).double().log(), rewards=VALUES)
        NCA(beta=0.5, temperature=0.7)(logps, batch)[0].backward()
        assert (float(logps.grad.abs().max()) < 1e-15) == (shift == 0)


def test_a_group_of_one_response_stays_at_the_reference(batch_of):
    """K = 1: −log σ(r_θ) − log σ(−r_θ) is flat at r_θ = 0, where it is 2 log 2."""
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    batch = batch_of([2], group=[0], reference_logps=logps.detach(), rewards=torch.tensor([7.0]))
    loss, _ = NCA(beta=0.5, temperature=0.1)(logps, batch)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert_close(logps.grad, torch.zeros(2))


def test_needs_groups_rewards_and_the_reference():
    assert kinds(NCA()) == {Groups, Rewards, ReferenceLogps}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"temperature": 0.0}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        NCA(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.temperature is α > 0, in units of reward"
