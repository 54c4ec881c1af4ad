"""The exact testbed's world: responses by hand, sums against closed forms, samples against their probabilities."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.testbed import one_step_world
from var.testbed.world import Responses, kl
from var.weights.estimators import InBatch


def test_responses_of_a_small_space_by_hand():
    """Letters a = 1 and b = 2, at most 2 tokens. "", a and b have an end token; aa, ab, ba and bb do not."""
    space = Responses(2, 2)
    prefix, token = space.path
    assert token.tolist() == [[0, 0], [1, 0], [2, 0], [1, 1], [1, 2], [2, 1], [2, 2]]
    assert prefix.tolist() == [[0, 0], [0, 1], [0, 2], [0, 1], [0, 1], [0, 2], [0, 2]]
    assert space.length.tolist() == [1, 2, 2, 2, 2, 2, 2]
    assert space.mask.tolist() == [[True, False], *[[True, True]] * 6]
    assert space.prefixes == 3


def test_token_logps_by_hand():
    """Next tokens (end, a, b): first 1/2, 1/4, 1/4; after a 1/5, 2/5, 2/5; after b 1, 0, 0. So "ab" has 1/4 · 2/5."""
    table = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4], [1.0, 0.0, 0.0]], dtype=torch.float64)
    space = Responses(2, 2)
    logps = space.token_logps(7.0 + table.log())  # a constant does not change logits
    assert_close(logps[4].exp(), torch.tensor([0.25, 0.4], dtype=torch.float64))
    assert_close(logps[0], torch.tensor([math.log(0.5), 0.0], dtype=torch.float64))
    found = space.logps(table.log()).exp()
    assert_close(found, torch.tensor([0.5, 0.05, 0.25, 0.1, 0.1, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(("letters", "tokens"), [(1, 1), (2, 4), (3, 3)])
def test_responses_are_unique_and_their_probabilities_sum_to_1(letters, tokens):
    space = Responses(letters, tokens)
    assert len(space.depth) == sum(letters**depth for depth in range(tokens + 1))
    words = {tuple(t[m].tolist()) for t, m in zip(space.path[1], space.mask, strict=True)}
    assert len(words) == len(space.depth)
    logits = torch.randn(5, space.prefixes, letters + 1, generator=torch.Generator().manual_seed(0)).double()
    assert_close(space.logps(logits).exp().sum(-1), torch.ones(5, dtype=torch.float64))


def test_optimum_partition_and_divergence_by_hand():
    """π_ref = (1/2, 1/2), r = (log 3, 0). λ = 1: Z = 2, π* = (3/4, 1/4). λ = 1/2: e^{r/λ} = 9, 1: π* = (.9, .1).

    KL(π* ‖ π_ref) = 3/4 log 3/2 + 1/4 log 1/2; E_{π*}[r] = 3/4 log 3, and E[r] − KL is log Z.
    """
    world = one_step_world([0.0, 0.0], [math.log(3), 0.0])
    assert_close(world.log_partition(1.0).exp(), torch.tensor([2.0]).double())
    assert_close(world.optimum(1.0).exp(), torch.tensor([[0.75, 0.25]]).double())
    assert_close(world.optimum(0.5).exp(), torch.tensor([[0.9, 0.1]]).double())
    best = world.optimum(1.0)
    assert float(kl(best, world.logps)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert world.reward(best) == pytest.approx(0.75 * math.log(3))
    assert objective(world, best, 1.0) == pytest.approx(math.log(2))


def objective(world, logps, temperature):
    """E[r] − λ KL(π ‖ π_ref)."""
    found = world.summary(logps, temperature)
    return found["reward"] - temperature * found["kl_policy_reference"]


def test_no_policy_beats_the_optimum(small):
    best = objective(small, small.optimum(0.7), 0.7)
    assert best == pytest.approx(0.7 * float(small.log_partition(0.7).mean()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        near = small.optimum(0.7) + 0.1 * torch.randn(small.logps.shape, generator=generator).double()
        assert objective(small, near.log_softmax(-1), 0.7) < best


def test_kl_with_a_response_of_probability_0(small):
    p = small.logps.clone()
    p[:, 0] = -torch.inf
    p = p.log_softmax(-1)
    assert bool(kl(p, small.logps).isfinite().all())
    assert bool((kl(small.logps, p) == torch.inf).all())
    assert_close(kl(p, small.logps), -small.logps[:, 0].exp().neg().log1p())  # −log of the remaining probability


def test_samples_follow_their_policy(small):
    """40,000 draws per prompt are within 5 standard errors of the probabilities, from π_ref and from π*."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(len(small))[:, None].expand(-1, 40_000)
    for policy in (None, small.optimum(0.5)):
        found = small.sample(prompts, generator, policy)
        frequency = torch.nn.functional.one_hot(found, small.logps.shape[1]).double().mean(1)
        p = (small.logps if policy is None else policy).exp()
        assert bool(((frequency - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt() + 1e-9).all())


def test_weight_inputs_hold_every_response_under_every_prompt(small):
    prompts, responses = torch.tensor([2, 0, 2, 1]), torch.tensor([5, 0, 14, 3])
    inputs = small.weight_inputs(prompts, responses, torch.tensor([[3, 0], [1, 2]]))
    assert inputs.group.tolist() == [2, 0, 2, 1]
    assert inputs.length.tolist() == [3, 1, 3, 3]
    assert inputs.cross_rewards[0, 0, 1] == small.rewards[1, 5]  # the prompt of row 3, the response of row 0
    assert inputs.cross_logps[1, 1, 0] == small.logps[2, 0]
    assert inputs.rewards[2] == small.rewards[2, 14]
    assert inputs.reference_logps[3] == small.logps[1, 3]
    assert InBatch()(inputs, 1.0).shape == (4,)
