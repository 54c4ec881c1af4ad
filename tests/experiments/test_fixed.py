"""Fixed points: exact weights and normalizers without the row itself lead to π*, others do not."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from experiments.tabular import fixed
from experiments.tabular.__main__ import READINGS
from experiments.tabular.fixed import (
    ESTIMATORS,
    SETTINGS,
    find_fixed_point,
    make_in_batch,
    make_table,
    measure,
    score_own,
)
from experiments.tabular.worlds import draw_micro_batches, draw_world
from tests.helpers.testbed import one_step_world
from var.requirements import Weights, find
from var.testbed.methods import load_loss
from var.testbed.world import kl
from var.weights.estimators import InBatch


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ["exact", "sampled", "leave-one-out", "global"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_normalizer_without_the_row_leads_to_the_optimum(small, name, temperature):
    """Even with three candidates and two draws."""
    log_weight = ESTIMATORS[name](small, 3, temperature, 2, generator())
    assert_close(find_fixed_point(small, log_weight), small.optimum(temperature), rtol=0, atol=1e-10)


def test_exact_weights_average_1_on_every_prompt(small):
    log_weight = ESTIMATORS["exact"](small, 3, 0.7, 2, generator())
    assert_close((small.logps + log_weight).logsumexp(-1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    constant = ESTIMATORS["global"](small, 3, 0.7, 2, generator())
    assert float((small.logps + constant).exp().sum(-1).mean()) == pytest.approx(1)


def test_sft_stays_at_the_reference(small):
    assert_close(find_fixed_point(small, ESTIMATORS["sft"](small, 8, 1.0, 1, generator())), small.logps)


def test_grouped_of_two_by_hand():
    """π_ref = (1/2, 1/2), r/λ = (log 3, 0), K = 2. The other response is y_1 or y_2 with probability 1/2 each.

    E[w|y_1] = 2 (1/2 · 1/2 + 1/2 · 3/4) = 5/4, E[w|y_2] = 2 (1/2 · 1/4 + 1/2 · 1/2) = 3/4. So π_fix = (5/8, 3/8), and
    π* = (3/4, 1/4).
    """
    world = one_step_world([0.0, 0.0], [2 * math.log(3), 0.0])
    log_weight = ESTIMATORS["grouped"](world, 2, 2.0, 200_000, generator())
    assert_close(log_weight.exp(), torch.tensor([[1.25, 0.75]]).double(), rtol=0.005, atol=0)
    assert_close(find_fixed_point(world, log_weight).exp(), torch.tensor([[0.625, 0.375]]).double(), rtol=0.005, atol=0)


@pytest.mark.parametrize(("reduction", "expected"), [("none", 56 / 75), ("sum", 64 / 75), ("mean", 64 / 75)])
def test_in_batch_of_two_by_hand(reduction, expected):
    """One prompt, π_ref = (4/5, 1/5), r = (0, log 2). Responses have one token, so `mean` is `sum`.

    none: e^r = 1, 2. E[w|y_1] = 4/5 · 1/2 + 1/5 · 1/3 = 7/15; E[w|y_2] = 4/5 · 2/3 + 1/5 · 1/2 = 19/30. π_fix ∝ 4/5 ·
    7/15, 1/5 · 19/30 = 56/150, 19/150.
    sum: π_ref e^r = 4/5, 2/5. E[w|y_1] = 4/5 · 1/2 + 1/5 · 2/3 = 8/15; E[w|y_2] = 4/5 · 1/3 + 1/5 · 1/2 = 11/30. π_fix
    ∝ 64/150, 11/150.
    """
    world = one_step_world([math.log(0.8), math.log(0.2)], [0.0, math.log(2)])
    log_weight = make_in_batch(InBatch(reduction=reduction))(world, 2, 1.0, 100_000, generator())
    assert float(find_fixed_point(world, log_weight)[0, 0].exp()) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    "estimator",
    [
        InBatch(reduction="mean"),
        InBatch(reduction="sum"),
        InBatch(reduction="none"),
        InBatch(reduction="mean", reference="own"),
        InBatch(reduction="sum", reference="own"),
    ],
)
def test_in_batch_rows_equal_the_package_weight(small, estimator):
    """For each response and prompt, InBatch on the full B × B tables of the same micro-batches, averaged."""
    size, draws, temperature = 3, 5, 0.7
    g = generator()
    found = make_in_batch(estimator)(small, size, temperature, draws, g)
    g = generator()
    for prompt in range(len(small)):
        x, y = draw_micro_batches(small, draws, size - 1, g)
        for answer in range(small.logps.shape[1]):
            prompts = torch.cat([torch.full((draws, 1), prompt), x], 1)
            responses = torch.cat([torch.full((draws, 1), answer), y], 1)
            rows = torch.arange(draws * size).reshape(draws, size)
            log_weights = estimator(small.weight_inputs(prompts.reshape(-1), responses.reshape(-1), rows), temperature)
            expected = log_weights.reshape(draws, size)[:, 0].exp().mean()
            assert float(found[prompt, answer].exp()) == pytest.approx(float(expected), rel=1e-12)


def test_balance_follows_its_formula(small):
    """One draw, one prompt and response: Ẑ computed pair by pair."""
    g = generator()
    found = fixed.weigh_balance(small, 3, 0.7, 1, g)
    g = generator()
    x, y = draw_micro_batches(small, 1, 2, g)
    p, e = small.logps.exp(), (small.rewards / 0.7).exp()
    for answer in (0, 7):
        prompts, answers = [0, *x[0].tolist()], [answer, *y[0].tolist()]
        z = sum(float(p[0, j] / p[prompts, j].sum() * e[0, j]) for j in answers)
        assert float(found[0, answer].exp()) == pytest.approx(float(e[0, answer]) / z, rel=1e-12)


def test_the_reference_can_be_omitted_from_the_numerator(small):
    estimator = InBatch(reduction="mean")
    full = make_in_batch(estimator)(small, 4, 1.0, 50, generator())
    part = make_in_batch(replace(estimator, reference_in_numerator=False))(small, 4, 1.0, 50, generator())
    assert_close(part, full - score_own(small, estimator))


@pytest.mark.parametrize(("label", "loss"), READINGS.items())
def test_readings_of_the_paper_are_the_losses(small, label, loss):
    weights = find(load_loss(loss).requires, Weights)
    found = make_in_batch(weights.estimator)(small, 4, 1.0, 20, generator())
    assert torch.equal(found, ESTIMATORS[label](small, 4, 1.0, 20, generator()))


def test_in_batch_weights_lie_between_the_reference_and_the_optimum():
    """A normalizer that contains the row pulls back to π_ref, more so for small K. `sum` tends to π_ref² e^r."""
    world = draw_world(0, prompts=6, letters=2, tokens=4, overlap=0.7)
    best = world.optimum(1.0)

    def distance(name: str, size: int) -> float:
        return float(kl(best, find_fixed_point(world, ESTIMATORS[name](world, size, 1.0, 400, generator()))).mean())

    assert distance("sft", 2) > distance("grouped", 2) > distance("grouped", 4) > distance("grouped", 16) > 0
    assert distance("in_batch none", 8) < distance("in_batch mean", 8) < distance("in_batch sum", 8)
    doubled = (2 * world.logps + world.rewards).log_softmax(-1)
    crowd = find_fixed_point(world, ESTIMATORS["in_batch sum"](world, 256, 1.0, 50, generator()))
    assert float(kl(doubled, crowd).mean()) < 0.02


def test_records_have_standard_errors_and_the_table_every_setting():
    small = dict(prompts=5, letters=2, tokens=4)
    records = make_table(worlds=("shared",), seeds=(0,), draws=80, **small)
    assert [(r["estimator"], r["size"], r["temperature"]) for r in records] == list(SETTINGS)
    by_name = {(r["estimator"], r["size"], r["temperature"]): r for r in records}
    exact, noisy = by_name["exact", 8, 1.0], by_name["in_batch sum", 8, 1.0]
    assert exact["kl_optimum_policy"] == pytest.approx(0, abs=1e-12)
    assert exact["mean_weight"] == pytest.approx(1)
    assert exact["reward_error"] < 1e-12 < noisy["reward_error"] < 0.1
    assert {r["world"] for r in records} == {"shared"}


def test_the_standard_error_matches_that_of_repeated_runs(small):
    """The spread of KL over 20 seeds is the error that each run reports, within a factor of 2."""
    runs = [measure(small, "in_batch mean", 4, 1.0, draws=160, seed=s) for s in range(20)]
    spread = torch.tensor([r["kl_optimum_policy"] for r in runs]).std()
    reported = torch.tensor([r["kl_optimum_policy_error"] for r in runs]).mean()
    assert 0.5 < float(reported / spread) < 2
