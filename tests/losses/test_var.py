"""VAR: weights of mean 1 over the rows that train, λ and its unit, and the SFT step that they weigh."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from var.weights.table import Table, micro_batch_inputs

from var.losses.var import VAR
from var.utils.errors import UserError
from var.weights.estimators import Global, Grouped, InBatch, Prompt, Value


def table(rewards: list[float], group: list[int]) -> Table:
    return Table(
        rewards=torch.tensor(rewards, dtype=torch.float64), group=torch.tensor(group), length=torch.ones(len(group))
    )


def test_loss_and_gradient_by_hand(batch_of):
    """A pair, Δr = 1, λ = 1/2: w = 1.7615942, 0.2384058. Σ w·nll = 2.5 w₁ + 9 w₂ = 6.5496380 over 12 tokens."""
    loss = VAR(estimator=Grouped(), temperature=0.5)
    weights = loss.weights(table([1.0, 0.0], [0, 0]))
    logps = torch.tensor([-0.5, -2.0, -9.0], dtype=torch.float64, requires_grad=True)
    value, _ = loss(logps, batch_of([2, 1], weights=weights, global_tokens=12.0))
    value.backward()
    assert value.item() == pytest.approx(6.549637986 / 12, rel=1e-9)
    assert_close(logps.grad, -torch.tensor([1.7615941559557646, 1.7615941559557646, 0.2384058440442354]).double() / 12)


def test_normalize_sequence_divides_by_sequences(batch_of):
    loss = VAR(estimator=Global(), normalize="sequence")
    value, _ = loss(torch.tensor([-1.0, -3.0]), batch_of([1, 1], weights=torch.ones(2), global_sequences=8.0))
    assert value.item() == 0.5


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("estimator", [Grouped(), Global(), Prompt(baseline="zero"), Value()])
def test_weights_have_mean_1_whatever_the_temperature(estimator, temperature):
    torch.manual_seed(0)
    rewards = torch.randn(24).double().tolist()
    data = replace(table(rewards, [i // 2 for i in range(24)]), features=torch.randn(12, 2))
    weights = VAR(estimator=estimator, temperature=temperature).weights(data)
    assert weights.dtype == torch.float64
    assert bool((weights >= 0).all())
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-9)


def test_a_large_temperature_is_sft():
    weights = VAR(estimator=Global(), temperature=1e9).weights(table([-3.0, 0.0, 5.0], [0, 1, 2]))
    assert_close(weights, torch.ones(3).double(), rtol=0, atol=1e-8)


def test_temperature_in_units_of_the_rewards_deviation():
    """Rewards 0, 2 | 5, 7: σ = √2. λ = 2σ = 2√2 in reward units; so the pair's weight is 2σ(2/(2√2)) = 1.3395, and
    scaling all rewards changes nothing."""
    data = table([0.0, 2.0, 5.0, 7.0], [0, 0, 1, 1])
    loss = VAR(estimator=Grouped(), temperature=2.0, temperature_unit="sd")
    assert loss.scaled_temperature(data) == pytest.approx(2 * math.sqrt(2))
    assert VAR(estimator=Grouped(), temperature=2.0).scaled_temperature(data) == 2.0
    expected = 2 / (1 + math.exp(-1 / math.sqrt(2)))
    assert_close(loss.weights(data)[1], torch.tensor(expected).double())
    assert_close(loss.weights(replace(data, rewards=40 * data.rewards)), loss.weights(data))


@pytest.mark.parametrize("data", [table([0.0, 2.0], [0, 1]), table([1.0, 1.0], [0, 0]), table([0.1] * 3, [0] * 3)])
def test_a_deviation_that_is_absent_or_0_is_an_error(data):
    with pytest.raises(UserError) as error:
        VAR(estimator=Grouped(), temperature_unit="sd").weights(data)
    assert str(error.value) == (
        "loss.temperature_unit=sd needs prompts whose responses differ in reward, and here none do: take several "
        "responses a prompt (data.responses=both or all, generate.responses), other prompts or another reward, or set "
        "loss.temperature_unit=reward"
    )


def test_a_weight_too_small_for_a_float_is_left_out_and_the_rest_has_mean_1():
    """e^−1000 = 0 in float64: that row trains no more than one that is left out, and the mean is over the others."""
    weights = VAR(estimator=Grouped(), temperature=1.0).weights(table([0.0, 1000.0, 0.0, 0.0], [0, 0, 1, 1]))
    assert_close(weights, torch.tensor([0.0, 1.5, 0.75, 0.75]).double())


def test_rows_under_min_weight_are_left_out_and_the_rest_has_mean_1():
    """e^{r/λ} = 1, 2, 9: weights 0.25, 0.5, 2.25. min_weight = 1/2 leaves the first out (a weight of just that stays):
    2 and 9 over their mean 5.5."""
    data = table([0.0, math.log(2), math.log(9)], [0, 1, 2])
    weights = VAR(estimator=Global(), min_weight=0.499999).weights(data)
    assert_close(weights, torch.tensor([0.0, 4 / 11, 18 / 11]).double())
    assert_close(VAR(estimator=Global(), min_weight=0.2).weights(data), torch.tensor([0.25, 0.5, 2.25]).double())


def test_needs_are_the_estimators():
    for estimator in (InBatch(), InBatch(reference="own"), Grouped(), Prompt(), Value(), Global()):
        assert VAR(estimator=estimator).needs == estimator.needs


def test_one_batch_as_a_table_gives_the_stored_weights(batch_of):
    """With a live reference the micro-batch is the table: the same softmax, row a prompt, column a response.

    r/λ = [[2, 0], [1, 4]], log π_ref(y_j|x_i)/length_j = [[−1, −2], [−2, −2]] → σ(3), σ(3); own pairs summed from
    tokens −1, −1 and −1, −2, −3: means −1, −2 → σ(3), σ(2).
    """
    batch = batch_of(
        [2, 3], rewards=torch.tensor([1.0, 2.0]), cross_rewards=torch.tensor([[1.0, 0.0], [0.5, 2.0]]),
        cross_logps=torch.tensor([[-2.0, -6.0], [-4.0, -6.0]]),
        reference_logps=torch.tensor([-1.0, -1.0, -1.0, -2.0, -3.0]),
    )  # fmt: skip
    cross, own = (InBatch(reference=r)(micro_batch_inputs(batch), 0.5).exp() for r in ("cross", "own"))
    assert_close(cross, torch.tensor([0.9525741268224334, 0.9525741268224334]).double())
    assert_close(own, torch.tensor([0.9525741268224334, 0.8807970779778823]).double())


def test_wrong_settings_say_what_is_allowed():
    in_batch = "loss.min_weight is ≥ 0, and 0 with an in-batch estimator, whose micro-batches are fixed"
    cases = [
        (dict(temperature=0.0), "loss.temperature is λ > 0, got 0.0; for λ → ∞ use loss=sft"),
        (dict(temperature=math.nan), "loss.temperature is λ > 0, got nan; for λ → ∞ use loss=sft"),
        (dict(temperature_unit="std"), "loss.temperature_unit is reward or sd, got std"),
        (dict(min_weight=-0.1), in_batch),
        (dict(estimator=InBatch(), min_weight=0.1), in_batch),
        (dict(normalize="mean"), "loss.normalize is token or sequence, got mean"),
    ]
    for options, text in cases:
        with pytest.raises(UserError) as error:
            VAR(**{"estimator": Global(), **options})
        assert str(error.value) == text
