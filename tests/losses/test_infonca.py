"""InfoNCA: values and gradients by hand, DPO as its limit, and its optimum over tables."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.dpo import DPO
from var.losses.infonca import InfoNCA
from var.losses.nca import NCA
from var.requirements import Groups, ReferenceLogps, Rewards
from var.utils.errors import UserError

# a prompt with three responses (2, 1, 1 tokens) and one with two (2, 1)
LENGTHS = [2, 1, 1, 2, 1]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -1.0]
REFERENCE = [-2.0, -3.0, -4.5, -1.0, -2.0, -2.5, -1.5]
# log-ratios: 2, 0.5, −2 | 2, 0.5
REWARDS = [1.0, 0.0, 0.5, 0.0, 3.0]


def group_batch(batch_of, sequences=slice(None), tokens=slice(None), group=(0, 0, 0, 1, 1), groups=2.0):
    return batch_of(
        LENGTHS[sequences], reference_logps=torch.tensor(REFERENCE[tokens]), group=group, global_groups=groups,
        rewards=torch.tensor(REWARDS[sequences]),
    )  # fmt: skip


LOSS = InfoNCA(beta=0.5, temperature=0.5)

# four responses of one token each; π_ref as eight draws, so that a group is the whole of its distribution
DRAWS = [0, 0, 0, 0, 1, 1, 2, 3]
POPULATION = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
VALUES = torch.tensor([0.3, 1.0, -0.5, 2.0], dtype=torch.float64)


def optimum(loss, batch_of):
    """π_θ [4] at the minimum over tables, the reference POPULATION, rewards VALUES."""
    batch = batch_of([1] * 8, group=[0] * 8, reference_logps=POPULATION.log()[DRAWS], rewards=VALUES[DRAWS])
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        value, _ = loss(logits.log_softmax(0)[DRAWS], batch)
        value.backward()
        return value

    solver.step(closure)
    return logits.detach().softmax(0)


def test_loss_and_gradient_by_hand(batch_of):
    """α = 1/2: r/α = 2, 0, 1 | 0, 6, target 0.6652410, 0.0900306, 0.2447285 | 0.0024726, 0.9975274. β = 1/2: r_θ = 1,
    0.25, −1 | 1, 0.25, softmax 0.6220059, 0.2938148, 0.0841793 | 0.6791787, 0.3208213. Cross-entropies 1.0317856,
    1.1350165. Gradient of a token: β (softmax − target)/2 groups."""
    value, gradient, metrics = loss_and_gradient(LOSS, group_batch(batch_of), LOGPS)
    assert value == pytest.approx((1.0317856002 + 1.1350165387) / 2, rel=1e-9)
    a, b, c, d = (0.25 * x for x in (-0.0432350728, 0.2037842015, -0.1605491287, 0.6767060760))
    assert_close(gradient, torch.tensor([a, a, b, c, d, d, -d], dtype=torch.float64), rtol=1e-8, atol=0)
    target = (0.6652409558 + 0.25 * 0.0900305732 - 0.2447284711 + 0.0024726232 + 0.25 * 0.9975273768) / 2
    expected = {"nll": 13.5 / 7, "implicit_reward/mean": 1.5 / 5, "implicit_reward/target": target}
    assert metrics == pytest.approx(expected)


def test_a_pair_is_dpo_with_the_target_as_label_smoothing(batch_of):
    """K = 2: the target of the worse response is σ(−Δr/α), 0.2 at Δr = α log 4; as Δr grows it is DPO."""
    torch.manual_seed(0)
    logps, reference = -torch.rand(2, 9, dtype=torch.float64)
    pairs = dict(reference_logps=reference, group=[0, 0, 1, 1], global_groups=2.0)
    for gap, smoothing in ((math.log(4), 0.2), (1e4, 0.0)):
        rewards = 0.7 * torch.tensor([5 + gap, 5.0, gap - 3, -3.0], dtype=torch.float64)
        batch = batch_of([2, 3, 3, 1], rewards=rewards, **pairs)
        ours, _ = InfoNCA(beta=0.6, temperature=0.7)(logps, batch)
        assert_close(ours, DPO(beta=0.6, label_smoothing=smoothing)(logps, batch)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_its_optimum_over_tables_is_the_reference_tilted(batch_of, beta):
    """π_ref exp(r/(αβ)) normalised, whatever β; responses drawn from π_ref."""
    found = optimum(InfoNCA(beta=beta, temperature=0.7), batch_of)
    assert_close(found, (POPULATION.log() + VALUES / (0.7 * beta)).softmax(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("draws", [[0, 3], [2, 1, 1], [0, 1, 2, 3, 3]])
def test_the_optimum_is_flat_in_groups_of_any_size(batch_of, draws):
    """At log π_θ/π_ref = r/(αβ) + a constant, target and softmax agree in every group, drawn whichever way."""
    logps = (POPULATION.log() + VALUES / (0.7 * 0.5)).log_softmax(0)[draws].requires_grad_(True)
    batch = batch_of(
        [1] * len(draws), group=[0] * len(draws), reference_logps=POPULATION.log()[draws], rewards=VALUES[draws]
    )
    InfoNCA(beta=0.5, temperature=0.7)(logps, batch)[0].backward()
    assert_close(logps.grad, torch.zeros(len(draws), dtype=torch.float64), rtol=0, atol=1e-15)


def test_large_rewards_over_a_small_temperature_do_not_overflow(batch_of):
    """r/α = 8e4 in float32: the target is all on the better response; a group of one response is 0 and flat."""
    logps = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    batch = batch_of([1, 1, 1], group=[0, 0, 1], reference_logps=torch.zeros(3), rewards=torch.tensor([8.0, 7.5, 9.0]))
    loss, _ = InfoNCA(beta=1.0, temperature=1e-4)(logps, batch)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)))
    assert_close(logps.grad, torch.tensor([-0.26894143, 0.26894143, 0.0]))


@pytest.mark.parametrize("loss", [LOSS, NCA(beta=0.5, temperature=0.5)])
def test_groups_of_a_step_add_up_over_micro_batches(batch_of, loss):
    """The divisor is the step's groups: micro-batches of one group each sum to the whole."""
    whole, _ = loss(torch.tensor(LOGPS).double(), group_batch(batch_of))
    first, _ = loss(torch.tensor(LOGPS[:4]).double(), group_batch(batch_of, slice(0, 3), slice(0, 4), (0, 0, 0)))
    second, _ = loss(torch.tensor(LOGPS[4:]).double(), group_batch(batch_of, slice(3, 5), slice(4, 7), (0, 0)))
    assert (first + second).item() == pytest.approx(whole.item(), rel=1e-15)


def test_needs_groups_rewards_and_the_reference():
    assert kinds(InfoNCA()) == {Groups, Rewards, ReferenceLogps}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"temperature": 0.0}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        InfoNCA(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.temperature is α > 0, in units of reward"
