"""VAR's weights on few rows: the fit, the weights by hand, and the order of methods on a small problem."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from experiments.tabular import finite
from experiments.tabular.finite import (
    SEVERAL,
    SINGLE,
    draw_problem,
    draw_rows,
    find_limit,
    fit,
    fit_ridges,
    measure_divergence,
)
from experiments.tabular.worlds import mean_overlap
from tests.helpers.testbed import between_deviation, within_deviation
from var.testbed.world import kl
from var.weights.estimators import normalize_log_weights

SMALL = dict(rows=64, tests=32, rest=96)


@pytest.fixture(scope="module")
def problem():
    return draw_problem(0, **SMALL)


def test_rewards_have_the_documented_spreads(problem):
    """2 between prompts, 1 within a prompt before the mismatch and a little more with it."""
    fair = draw_problem(0, mismatch=0.0, **SMALL).world
    assert within_deviation(fair) == pytest.approx(1.0)
    assert between_deviation(fair) == pytest.approx(2.0)
    assert 1.0 < within_deviation(problem.world) < 1.4
    assert mean_overlap(problem.world.logps) == pytest.approx(0.08, abs=0.02)
    assert set(problem.train.tolist()).isdisjoint(problem.test.tolist())


def test_features_are_standardized_under_the_mean_reference(problem):
    mixture = problem.world.logps.exp().mean(0)
    z = problem.outputs
    assert z.shape == (259, 6 * 3 + 3)
    assert_close(mixture @ z, torch.zeros(21).double(), rtol=0, atol=1e-12)
    assert_close(mixture @ z.square(), torch.ones(21).double())


def test_the_fit_is_the_maximum(problem):
    """At θ the gradient of Σ w log π_θ − ridge |θ|²/2, by autograd, is 0."""
    generator = torch.Generator().manual_seed(0)
    prompts, responses, _ = draw_rows(problem, 2, 8, 4, generator)
    weights = torch.rand(len(prompts), generator=generator).double()
    present, place = prompts.unique(return_inverse=True)
    mass = torch.zeros(len(present)).double().index_add(0, place, weights)
    target = torch.zeros(len(present), 21).double().index_add(0, place, weights[:, None] * problem.outputs[responses])
    theta = fit(problem, present, mass, target, 0.3, torch.zeros(2, 21).double()).requires_grad_()
    scores = problem.inputs[prompts] @ theta @ problem.outputs.T
    logps = (problem.world.logps[prompts] + scores).log_softmax(-1)
    value = (weights * logps[torch.arange(len(prompts)), responses]).sum() - 0.15 * theta.square().sum()
    (gradient,) = torch.autograd.grad(value, theta)
    assert float(gradient.abs().max()) < 1e-5
    assert float(theta.detach().abs().max()) > 0.05


def test_a_large_ridge_stays_at_the_reference(problem):
    generator = torch.Generator().manual_seed(0)
    prompts, responses, data = draw_rows(problem, 1, 8, 4, generator)
    best = problem.world.optimum(1.0)
    reference = float(kl(best, problem.world.logps)[problem.test].mean())
    (divergence,) = fit_ridges(problem, prompts, responses, torch.ones(64).double(), 1.0, [1e6])
    assert divergence == pytest.approx(reference, abs=1e-4)
    assert measure_divergence(problem, torch.zeros(2, 21).double(), 1.0) == pytest.approx(reference)
    assert data.candidates.shape == (64, 4)


def test_the_limit_is_0_if_the_family_contains_the_optimum():
    """Without a reward outside the family and without mismatch, π* is π_ref e^{φ·θ}."""
    assert find_limit(draw_problem(0, outside=0.0, mismatch=0.0, **SMALL), 1.0) == pytest.approx(0, abs=1e-3)
    assert find_limit(draw_problem(0, outside=0.5, mismatch=0.0, **SMALL), 1.0) > 0.03


def test_leave_one_out_and_balance_by_hand(problem):
    """K = 2 and r/λ = (log 3, 0): e^r over that of the other row is 3/1 and 1/3. balance is compared row by row."""
    prompts, responses, data = draw_rows(problem, 2, 4, 2, torch.Generator().manual_seed(0))
    data = replace(data, rewards=torch.tensor([math.log(9), 0.0]).double().repeat(32))
    found = finite.weigh_leave_one_out(problem, prompts, responses, data, 2.0).exp()
    assert_close(found, torch.tensor([3.0, 1 / 3]).double().repeat(32))
    found = finite.weigh_balance(problem, prompts, responses, data, 2.0)
    rows = data.micro[5].tolist()
    i = rows[1]
    p, r = problem.world.logps.exp(), problem.world.rewards
    z = sum(
        p[prompts[i], responses[j]] / sum(p[prompts[k], responses[j]] for k in rows)
        * (r[prompts[i], responses[j]] / 2.0).exp()
        for j in rows
    )  # fmt: skip
    assert float(found[i]) == pytest.approx(float(data.rewards[i] / 2.0 - z.log()))


def test_leave_one_out_is_finite_if_one_row_dominates_its_group(problem):
    prompts, responses, data = draw_rows(problem, 2, 8, 2, torch.Generator().manual_seed(0))
    data = replace(data, rewards=torch.tensor([100.0, 0.0]).double().repeat(32))
    assert bool(finite.weigh_leave_one_out(problem, prompts, responses, data, 1.0).isfinite().all())


def test_exact_weights_average_1_and_are_capped(problem):
    prompts, responses, data = draw_rows(problem, 1, 8, 2, torch.Generator().manual_seed(0))
    exact = finite.weigh_exactly(problem, prompts, responses, data, 1.0).exp()
    assert float(exact.mean()) == pytest.approx(1, abs=0.5)
    capped = finite.cap_weights(finite.weigh_exactly, 2.0)(problem, prompts, responses, data, 1.0).exp()
    assert float(capped.max()) == pytest.approx(2)
    assert_close(capped, (exact / exact.mean()).clamp(max=2))


def test_every_method_has_weights_of_mean_1(problem):
    for weighers, per_prompt in ((SINGLE, 1), (SEVERAL, 4)):
        prompts, responses, data = draw_rows(problem, per_prompt, 8, 8, torch.Generator().manual_seed(0))
        assert torch.bincount(data.group).unique().tolist() == [per_prompt]
        for name, weigher in weighers.items():
            weights = normalize_log_weights(weigher(problem, prompts, responses, data, 1.0)).exp()
            assert float(weights.mean()) == pytest.approx(1), name


def test_the_order_of_methods_on_half_the_rows():
    """exact < prompt < the paper's < SFT, and none is below the family's limit."""
    records = finite.make_table(
        settings=(("apart", 1.0, 1),), seeds=(0, 1, 3), methods=("sft", "in_batch mean", "prompt 4", "exact, capped"),
        ridges=(1e-2, 1e-1, 1.0, 10.0), rows=256, tests=128, rest=256,
    )  # fmt: skip
    score = {record["method"]: record["kl"] for record in records}
    assert records[0]["limit"] < score["exact, capped"] < score["prompt 4"] < score["in_batch mean"] < score["sft"]
    assert records[0]["gap"] == 0
    assert records[0]["mean_ess"] == pytest.approx(1)
