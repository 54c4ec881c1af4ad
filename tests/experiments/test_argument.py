"""The paper's appendix: fixed points under a clip, compared with training, and the bound of the loss."""

import math

import pytest
import torch
from torch.testing import assert_close

from experiments.tabular.argument import (
    bound_loss,
    compare_close_rewards,
    compute_batch_entropy,
    compute_gains,
    compute_loss,
    find_clipped_fixed_point,
    find_temperature,
    make_table,
    make_two_answers,
    measure_bounds,
    measure_clips,
    tilt,
)
from experiments.tabular.worlds import draw_micro_batches
from tests.helpers.testbed import one_step_world
from var.testbed.world import expectation, kl


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ratio_of_two_responses_with_close_rewards():
    """Rewards 1.0 and 0.9. R-LoL gives 1/.9, VAR e^{.1/λ}.

    A clip multiplies the ratio by 1.9/.1 or 1.2/.8. A-LoL gives .2/.1 for V = .8, and 0 to the second for V = .95.
    """
    found = {record["objective"]: record["apart"] for record in compare_close_rewards()}
    expected = {
        "var, λ = 1.0": math.exp(0.1), "var, λ = 0.1": math.e, "r_lol": 1 / 0.9, "r_lol, clip 0.9": 1.9 / 0.09,
        "r_lol, clip 0.2": 1.2 / 0.72, "a_lol, V = 0.8": 2.0, "a_lol, V = 0.95": math.inf,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-12)


def test_tilt_by_hand(small):
    gain = small.rewards.exp()
    assert_close(tilt(small, gain), small.optimum(1.0))


@pytest.mark.parametrize("epsilon", [0.9, 0.2])
@pytest.mark.parametrize("name", ["r_lol", "a_lol"])
def test_a_clipped_fixed_point_is_a_fixed_point(small, name, epsilon):
    """π ∝ π_ref · gain · clip(π/π_ref, 1 − ε, 1 + ε). At most one ratio per prompt is inside the clip range."""
    gain = compute_gains(small)[name]
    policy = find_clipped_fixed_point(small, gain, epsilon)
    assert_close(policy.logsumexp(-1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    ratio = (policy - small.logps).exp()
    again = (small.logps.exp() * gain * ratio.clamp(1 - epsilon, 1 + epsilon)).log().log_softmax(-1)
    assert_close(again.exp(), policy.exp(), rtol=0, atol=1e-9)
    inside = (ratio > 1 - epsilon + 1e-9) & (ratio < 1 + epsilon - 1e-9)
    assert int(inside.sum(-1).max()) <= 1


@pytest.mark.parametrize(("name", "epsilon"), [("r_lol", 0.9), ("r_lol", 0.2), ("a_lol", 0.9)])
def test_training_from_the_reference_ends_at_the_fixed_point(small, name, epsilon):
    """Gradient descent on logits from π_ref, with gain · clip(ρ) detached, as the authors train."""
    gain, reference = compute_gains(small)[name], small.logps.exp()
    logits = small.logps.clone()
    for _ in range(20_000):
        policy = logits.softmax(-1)
        pull = reference * gain * (policy / reference).clamp(1 - epsilon, 1 + epsilon)
        logits = logits + 2.0 * (pull - policy * pull.sum(-1, keepdim=True))
    reached = logits.log_softmax(-1)
    assert float(kl(find_clipped_fixed_point(small, gain, epsilon), reached).mean()) < 2e-3


def test_the_response_at_the_jump_takes_the_remaining_probability():
    """ε = .9, all responses equally likely.

    Gains 1, 1.001, 9: only 9 is above the clip range. Σ = c (2.001 · .1 + 9 · 1.9)/3 = 1 at c = .1734, without a jump.
    Equal gains stay at π_ref.

    Gains 1, 1, 1, 1.01: for c just below 1 only the last is above, and Σ = (.3 + 1.919)/4 < 1. For c = 1 all are, and
    Σ = 1.9. So c = 1, the last has ρ = 1.919, and the first three are inside and share the remaining probability.
    """
    three = one_step_world([0.0] * 3, [1.0, 1.001, 9.0])
    c = 3 / (2.001 * 0.1 + 9 * 1.9)
    expected = f64(c * 0.1, c * 0.1001, c * 9 * 1.9)[None] / 3
    assert_close(find_clipped_fixed_point(three, three.rewards, 0.9).exp(), expected)
    assert_close(find_clipped_fixed_point(three, torch.ones(1, 3).double(), 0.9), three.logps)
    four = one_step_world([0.0] * 4, [1.0, 1.0, 1.0, 1.01])
    ratio = find_clipped_fixed_point(four, four.rewards, 0.9).exp() * 4
    assert_close(ratio, f64(*[(4 - 1.919) / 3] * 3, 1.919)[None])


def test_clipping_moves_the_policy_further_from_the_reference(small):
    """The wider the clip range, the further. No objective beats π*'s reward at its own KL.

    A-LoL gives probability 0 to every response below V.
    """
    found = {(r["objective"], r["clip"]): r for r in measure_clips(small)}
    for name in ("r_lol", "a_lol"):
        held, narrow, wide = (found[name, clip]["kl_policy_reference"] for clip in (0.0, 0.2, 0.9))
        assert held < narrow < wide
    for record in found.values():
        assert record["reward"] <= record["best_reward"] + 1e-9
    below = small.rewards <= expectation(small.logps, small.rewards)[:, None]
    given_up = float(expectation(small.logps, below.double()).mean())
    assert found["a_lol", 0.9]["given_up"] == pytest.approx(given_up)
    assert found["r_lol", 0.9]["given_up"] == 0 == found["optimum", 0.0]["kl_optimum_policy"]


def test_find_temperature_inverts_the_divergence(small):
    divergence = float(kl(small.optimum(0.37), small.logps).mean())
    assert find_temperature(small, divergence) == pytest.approx(0.37)


def test_the_bound_by_hand():
    """Prompt 0 has y_0 with weights 1 + 2 and y_1 with 1, so c = 4 and p = (3/4, 1/4). Prompt 1 has one response.

    So the bound is 4 H(1/4), divided by 2.
    """
    weights, prompts, responses = f64(1, 1, 5, 2), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 7, 0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert bound_loss(weights, prompts, responses) == pytest.approx(4 * entropy)
    assert bound_loss(weights, prompts, responses, 2.0) == pytest.approx(2 * entropy)


def test_batch_entropy_is_not_a_bound():
    """For two prompts with one response each it is 2 log 2 = 1.39, and the infimum is 0."""
    weights, prompts, responses = f64(1, 1), torch.tensor([0, 1]), torch.tensor([3, 3])
    assert bound_loss(weights, prompts, responses) == 0
    assert compute_batch_entropy(weights) == pytest.approx(2 * math.log(2))


def test_the_loss_equals_the_bound_only_at_p(small):
    """The gap is Σ_x c(x) KL(p ‖ π_θ), which is positive unless π_θ = p."""
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (t.reshape(-1) for t in draw_micro_batches(small, 60, 1, generator))
    weights = torch.rand(60, generator=generator).double()
    data = torch.zeros_like(small.logps).index_put((prompts, responses), weights, accumulate=True)
    c = data.sum(-1)
    p = (data / c[:, None]).log()
    bound = bound_loss(weights, prompts, responses)
    assert compute_loss(weights, prompts, responses, p) == pytest.approx(bound, abs=1e-12)
    for step in (0.01, 1.0):
        policy = (p + step * torch.randn(p.shape, generator=generator).double()).log_softmax(-1)
        gap = compute_loss(weights, prompts, responses, policy) - bound
        assert gap == pytest.approx(float((c * kl(p, policy)).sum()))
        assert gap > 0


def test_a_negative_added_up_weight_has_no_bound():
    """2 − 1 is positive, so there is a bound. 1 − 2 is negative: as π_θ(y|x) → 0 the loss falls without bound."""
    prompts, responses = torch.tensor([0, 0, 0]), torch.tensor([4, 4, 2])
    assert bound_loss(f64(2, -1, 1), prompts, responses) == pytest.approx(2 * math.log(2))
    assert bound_loss(f64(1, -2, 1), prompts, responses) == -math.inf
    assert bound_loss(f64(0, 0, 0), prompts, responses) == 0
    world = make_two_answers((0.0, 0.0))
    losses = []
    for logit in (0.0, 10.0, 100.0):
        logps = world.responses.logps(torch.tensor([[[logit, 0.0]]]).double())
        losses.append(compute_loss(f64(1, -2), torch.tensor([0, 0]), torch.tensor([0, 1]), logps))
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < -199


def test_with_exact_weights_the_bound_is_the_entropy_of_the_optimum(small):
    """All (x, y) with weight π_ref e^r / Z: p = π*, c = 1."""
    best = small.optimum(0.7)
    prompts = torch.arange(4).repeat_interleave(15)
    responses = torch.arange(15).repeat(4)
    bound = bound_loss(best.exp().reshape(-1), prompts, responses, 4)
    assert bound == pytest.approx(float(expectation(best, -best).mean()), rel=1e-12)
    many = measure_bounds(small, temperature=0.7, rows=20_000)[-1]
    assert many["bound"] == pytest.approx(many["optimum_entropy"], rel=0.02)
    assert many["least"] == pytest.approx(many["bound"], abs=1e-12)
    assert many["bound"] < many["at_optimum"] < many["at_reference"]


def test_the_table_has_each_part():
    records = make_table(worlds=("shared",), seeds=(0,), rows=64, prompts=4, letters=2, tokens=3)
    assert [r["part"] for r in records] == ["close rewards"] * 7 + ["clip"] * 7 + ["bound"] * 2
