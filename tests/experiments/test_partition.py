"""Estimates of Z(x): each equals its formula, and its bias and variance are those of theory."""

import math

import pytest
import torch
from torch.testing import assert_close

from experiments.tabular.partition import PARTITIONS, make_table, measure
from experiments.tabular.worlds import draw_micro_batches, draw_world

DRAWS = 6
SIZE = 3
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def own(small):
    prompts = torch.arange(len(small))[:, None].expand(-1, DRAWS)
    return small.sample(prompts, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PARTITIONS)
def test_each_estimate_equals_its_formula(small, own, name):
    """The same draws, term by term: a prompt, its own response, two more pairs or responses."""
    found = PARTITIONS[name](small, own, SIZE, TEMPERATURE, torch.Generator().manual_seed(0)).exp()
    generator = torch.Generator().manual_seed(0)
    p, e, length = small.logps.exp(), (small.rewards / TEMPERATURE).exp(), small.responses.length.double()
    count = len(small)
    if name in ("grouped", "sampled", "leave-one-out"):
        fresh = {"grouped": SIZE - 1, "sampled": SIZE, "leave-one-out": SIZE - 1}[name]
        prompts = torch.arange(count)[:, None, None].expand(count, DRAWS, fresh)
        answers = small.sample(prompts, generator)
        if name == "grouped":
            answers = torch.cat([own[..., None], answers], -1)
    else:
        pairs = draw_micro_batches(small, count * DRAWS, SIZE - 1, generator)
        others, answers = (t.reshape(count, DRAWS, SIZE - 1) for t in pairs)
        answers = torch.cat([own[..., None], answers], -1)
    for x in range(count):
        for m in range(DRAWS):
            ys = answers[x, m].tolist()
            xs = [x, *others[x, m].tolist()] if "batch" in name or name == "balance" else [x] * len(ys)
            rows = xs if "own" in name else [x] * len(ys)
            if "sum" in name:
                terms = [15 * p[i, y] * e[x, y] for i, y in zip(rows, ys, strict=True)]
            elif "mean" in name:
                terms = [p[i, y] ** (1 / length[y]) * e[x, y] for i, y in zip(rows, ys, strict=True)]
            elif name == "balance":
                terms = [len(ys) * p[x, y] / p[xs, y].sum() * e[x, y] for y in ys]
            else:
                terms = [e[x, y] for y in ys]
            assert float(found[x, m]) == pytest.approx(float(sum(terms)) / len(terms), rel=1e-12)


@pytest.mark.parametrize("name", ["sampled", "grouped", "leave-one-out", "balance"])
def test_unbiased_estimates(small, name):
    found = measure(small, name, 4, 1.0, draws=20_000)
    assert abs(found["relative_bias"]) < 4 * found["relative_bias_error"] < 0.05


def test_the_variance_of_a_sampled_estimate_is_known(small):
    """Var(Ẑ)/Z² = Var_{π_ref}(e^r) / Z² / K, and the bias of log Ẑ is about −half of that."""
    squares = (small.logps + 2 * small.rewards).logsumexp(-1) - 2 * small.log_partition(1.0)
    expected = float((squares.exp() - 1).mean())
    for size in (4, 16):
        found = measure(small, "sampled", size, 1.0, draws=20_000)
        assert found["relative_variance"] == pytest.approx(expected / size, rel=0.05)
        assert found["variance"] == pytest.approx(expected / size, rel=0.05)
    assert found["log_bias"] == pytest.approx(-expected / 32, rel=0.3)
    assert abs(found["own_correlation"]) < 0.02


def test_an_estimate_that_contains_the_row_correlates_with_its_reward(small):
    """grouped: corr(Ẑ, own e^r) = 1/√K, and about that for the logs. leave-one-out: 0."""
    assert measure(small, "grouped", 4, 1.0)["own_correlation"] == pytest.approx(0.5, abs=0.1)
    assert abs(measure(small, "leave-one-out", 4, 1.0)["own_correlation"]) < 0.03


def test_more_pairs_reduce_the_variance_but_not_the_bias():
    """If other prompts' responses score lower, mean e^{r_ij} is below Z, more so with more pairs, by prompt."""
    world = draw_world(0, prompts=12, letters=3, tokens=3, overlap=0.2, mismatch=4.0)
    small, large = (measure(world, "in_batch none", size, 1.0) for size in (4, 32))
    assert large["relative_variance"] < small["relative_variance"] / 2
    assert large["relative_bias"] < small["relative_bias"] < -0.3
    assert large["log_bias_spread"] > 3 * measure(world, "sampled", 32, 1.0)["log_bias_spread"]


def test_without_rewards_the_estimate_is_1(small):
    flat = type(small)(
        responses=small.responses, logits=small.logits, rewards=torch.zeros_like(small.rewards), features=small.features
    )
    for name in ("in_batch none", "grouped", "sampled", "leave-one-out"):
        own = torch.zeros(4, 5).long()
        found = PARTITIONS[name](flat, own, 3, 1.0, torch.Generator().manual_seed(0))
        assert_close(found, torch.zeros(4, 5).double(), rtol=0, atol=1e-14)


def test_the_table_has_a_record_for_each():
    records = make_table(worlds=("shared", "apart"), seeds=(0,), sizes=(2, 4), draws=50, prompts=4, letters=3, tokens=4)
    assert len(records) == 2 * len(PARTITIONS) * 2
    assert all(math.isfinite(value) for record in records for value in record.values() if isinstance(value, float))
