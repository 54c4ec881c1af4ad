"""The paper's appendix, checked: fixed points under a clip against runs, the bound by hand and against a search."""

import math

import pytest
import torch
from torch.testing import assert_close

from experiments.tabular.argument import (
    batch_entropy,
    bound_records,
    clip_records,
    clipped,
    close_rewards,
    entropy_bound,
    gains,
    table,
    temperature_at,
    tilted,
    two_answers,
    weighted_nll,
)
from var.testbed.world import Responses, World, expectation, kl


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def world_of(rewards: torch.Tensor) -> World:
    """One prompt, answers of one token that π_ref gives equally often."""
    count = len(rewards)
    logits = torch.zeros(1, 1, count, dtype=torch.float64)
    return World(responses=Responses(count - 1, 1), logits=logits, rewards=rewards[None], features=rewards[None])


def test_close_rewards_are_told_apart_by_either():
    """1.0 and 0.9: r gives 1/.9, VAR e^{.1/λ}. A clip multiplies: 1/.9 · 1.9/.1, 1/.9 · 1.2/.8. A⁺ over V = .8: .2/.1;
    over V = .95 the second gets nothing."""
    found = {record["objective"]: record["apart"] for record in close_rewards()}
    expected = {
        "var, λ = 1.0": math.exp(0.1), "var, λ = 0.1": math.e, "r_lol": 1 / 0.9, "r_lol, clip 0.9": 1.9 / 0.09,
        "r_lol, clip 0.2": 1.2 / 0.72, "a_lol, V = 0.8": 2.0, "a_lol, V = 0.95": math.inf,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-12)


def test_tilted_by_hand(small):
    gain = small.rewards.exp()
    assert_close(tilted(small, gain), small.optimum(1.0))


@pytest.mark.parametrize("epsilon", [0.9, 0.2])
@pytest.mark.parametrize("name", ["r_lol", "a_lol"])
def test_a_clipped_fixed_point_is_one(small, name, epsilon):
    """π ∝ π_ref · gain · clip(π/π_ref, 1 − ε, 1 + ε), and ρ is outside of the clip but at one answer a prompt."""
    gain = gains(small)[name]
    policy = clipped(small, gain, epsilon)
    assert_close(policy.logsumexp(-1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    ratio = (policy - small.logps).exp()
    again = (small.logps.exp() * gain * ratio.clamp(1 - epsilon, 1 + epsilon)).log().log_softmax(-1)
    assert_close(again.exp(), policy.exp(), rtol=0, atol=1e-9)
    inside = (ratio > 1 - epsilon + 1e-9) & (ratio < 1 + epsilon - 1e-9)
    assert int(inside.sum(-1).max()) <= 1


@pytest.mark.parametrize(("name", "epsilon"), [("r_lol", 0.9), ("r_lol", 0.2), ("a_lol", 0.9)])
def test_a_run_from_the_reference_ends_at_the_fixed_point(small, name, epsilon):
    """Gradient descent on logits from π_ref, the coefficient gain · clip(ρ) detached, as the authors train."""
    gain, reference = gains(small)[name], small.logps.exp()
    logits = small.logps.clone()
    for _ in range(20_000):
        policy = logits.softmax(-1)
        pull = reference * gain * (policy / reference).clamp(1 - epsilon, 1 + epsilon)
        logits = logits + 2.0 * (pull - policy * pull.sum(-1, keepdim=True))
    reached = logits.log_softmax(-1)
    assert float(kl(clipped(small, gain, epsilon), reached).mean()) < 2e-3


def test_the_answer_at_the_jump_takes_the_rest():
    """ε = .9. Gains 1, 1.001, 9 of 1/3 each: only 9 is over, Σ = c (2.001 · .1 + 9 · 1.9)/3 is 1 at c = .1734: no jump.

    Gains 1, 1, 1, 1.01 of 1/4 each: at c just under 1 only the last is over, Σ = (.3 + 1.919)/4 < 1; at 1 all are, and
    Σ = 1.9. So c = 1, the last has ρ = 1.919, and the first three lie inside the clip and share what is left. Equal
    gains stay at π_ref.
    """
    three = world_of(f64(1.0, 1.001, 9.0))
    c = 3 / (2.001 * 0.1 + 9 * 1.9)
    expected = f64(c * 0.1, c * 0.1001, c * 9 * 1.9)[None] / 3
    assert_close(clipped(three, three.rewards, 0.9).exp(), expected)
    assert_close(clipped(three, torch.ones(1, 3).double(), 0.9), three.logps)
    four = world_of(f64(1.0, 1.0, 1.0, 1.01))
    ratio = clipped(four, four.rewards, 0.9).exp() * 4
    assert_close(ratio, f64(*[(4 - 1.919) / 3] * 3, 1.919)[None])


def test_clipping_leaves_further_than_the_ratio_held_at_1(small):
    """A clipped run does not stay next to π_ref; the wider the clip, the further. No objective beats π*'s
    reward at its own KL; A-LoL gives up every answer below V."""
    found = {(r["objective"], r["clip"]): r for r in clip_records(small)}
    for name in ("r_lol", "a_lol"):
        held, narrow, wide = (found[name, clip]["kl_policy_reference"] for clip in (0.0, 0.2, 0.9))
        assert held < narrow < wide
    for record in found.values():
        assert record["reward"] <= record["best_reward"] + 1e-9
    below = small.rewards <= expectation(small.logps, small.rewards)[:, None]
    given_up = float(expectation(small.logps, below.double()).mean())
    assert found["a_lol", 0.9]["given_up"] == pytest.approx(given_up)
    assert found["r_lol", 0.9]["given_up"] == 0 == found["optimum", 0.0]["kl_optimum_policy"]


def test_temperature_at_a_divergence_is_found(small):
    divergence = float(kl(small.optimum(0.37), small.logps).mean())
    assert temperature_at(small, divergence) == pytest.approx(0.37)


def test_the_bound_by_hand():
    """Prompt 0: y_0 twice with 1 + 2, y_1 with 1: c = 4, p = (3/4, 1/4); prompt 1: one answer, 5: nothing. So 4 H(1/4),
    over the divisor 2."""
    weights, prompts, responses = f64(1, 1, 5, 2), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 7, 0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy_bound(weights, prompts, responses) == pytest.approx(4 * entropy)
    assert entropy_bound(weights, prompts, responses, 2.0) == pytest.approx(2 * entropy)


def test_two_prompts_of_one_answer_have_the_bound_0_and_the_batch_entropy_is_none():
    """2 log 2 = 1.39 against an infimum of 0."""
    weights, prompts, responses = f64(1, 1), torch.tensor([0, 1]), torch.tensor([3, 3])
    assert entropy_bound(weights, prompts, responses) == 0
    assert batch_entropy(weights) == pytest.approx(2 * math.log(2))


def test_the_loss_meets_the_bound_at_p_and_lies_above_it_elsewhere(small):
    """Equality iff π_θ = p: the gap is Σ_x c(x) KL(p ‖ π_θ), positive as soon as π_θ is off."""
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (t.reshape(-1) for t in small.micro_batches(60, 1, generator))
    weights = torch.rand(60, generator=generator).double()
    data = torch.zeros_like(small.logps).index_put((prompts, responses), weights, accumulate=True)
    c = data.sum(-1)
    p = (data / c[:, None]).log()
    bound = entropy_bound(weights, prompts, responses)
    assert weighted_nll(weights, prompts, responses, p) == pytest.approx(bound, abs=1e-12)
    for step in (0.01, 1.0):
        policy = (p + step * torch.randn(p.shape, generator=generator).double()).log_softmax(-1)
        gap = weighted_nll(weights, prompts, responses, policy) - bound
        assert gap == pytest.approx(float((c * kl(p, policy)).sum()))
        assert gap > 0


def test_a_prompt_of_weight_0_is_free_and_one_negative_answer_has_no_bound():
    """w(x, y) = 2 − 1 is positive, so the bound stands; 1 − 2 is not: π_θ(y|x) → 0 sends the loss down for ever."""
    prompts, responses = torch.tensor([0, 0, 0]), torch.tensor([4, 4, 2])
    assert entropy_bound(f64(2, -1, 1), prompts, responses) == pytest.approx(2 * math.log(2))
    assert entropy_bound(f64(1, -2, 1), prompts, responses) == -math.inf
    assert entropy_bound(f64(0, 0, 0), prompts, responses) == 0
    world = two_answers((0.0, 0.0))
    losses = []
    for logit in (0.0, 10.0, 100.0):
        logps = world.responses.logps(torch.tensor([[[logit, 0.0]]]).double())
        losses.append(weighted_nll(f64(1, -2), torch.tensor([0, 0]), torch.tensor([0, 1]), logps))
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < -199


def test_with_exact_weights_the_bound_is_the_entropy_of_the_optimum(small):
    """All (x, y) with weight π_ref e^r / Z: p = π*, c = 1."""
    best = small.optimum(0.7)
    prompts = torch.arange(4).repeat_interleave(15)
    responses = torch.arange(15).repeat(4)
    bound = entropy_bound(best.exp().reshape(-1), prompts, responses, 4)
    assert bound == pytest.approx(float(expectation(best, -best).mean()), rel=1e-12)
    many = bound_records(small, temperature=0.7, rows=20_000)[-1]
    assert many["bound"] == pytest.approx(many["optimum_entropy"], rel=0.02)
    assert many["least"] == pytest.approx(many["bound"], abs=1e-12)
    assert many["bound"] < many["at_optimum"] < many["at_reference"]


def test_the_table_has_each_part():
    records = table(worlds=("shared",), seeds=(0,), rows=64, prompts=4, letters=2, tokens=3)
    assert [r["part"] for r in records] == ["close rewards"] * 7 + ["clip"] * 7 + ["bound"] * 2
