"""The enumerable world: its responses by hand, its sums against closed forms, its draws against their probabilities."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from var.testbed.world import WORLDS, Responses, World, draw, expectation, foreign, kl, mean_overlap
from var.weights.estimators import InBatch


def test_every_response_of_a_small_space_by_hand():
    """Two letters a = 1, b = 2, at most 2 tokens: "", a, b end; aa, ab, ba, bb are cut. Prefixes: "" is 0, a 1, b 2."""
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
    logps = space.token_logps(7.0 + table.log())  # logits: a constant more is the same table
    assert_close(logps[4].exp(), torch.tensor([0.25, 0.4], dtype=torch.float64))
    assert_close(logps[0], torch.tensor([math.log(0.5), 0.0], dtype=torch.float64))
    found = space.logps(table.log()).exp()
    assert_close(found, torch.tensor([0.5, 0.05, 0.25, 0.1, 0.1, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(("letters", "tokens"), [(1, 1), (2, 4), (3, 3)])
def test_responses_are_all_there_once_and_sum_to_1(letters, tokens):
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
    rewards = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    world = World(responses=Responses(1, 1), logits=torch.zeros(1, 1, 2).double(), rewards=rewards, features=rewards)
    assert_close(world.log_partition(1.0).exp(), torch.tensor([2.0]).double())
    assert_close(world.optimum(1.0).exp(), torch.tensor([[0.75, 0.25]]).double())
    assert_close(world.optimum(0.5).exp(), torch.tensor([[0.9, 0.1]]).double())
    best = world.optimum(1.0)
    assert float(kl(best, world.logps)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert world.reward(best) == pytest.approx(0.75 * math.log(3))
    assert world.objective(best, 1.0) == pytest.approx(math.log(2))
    assert world.within_deviation() == pytest.approx(math.log(3) / 2)


def test_no_policy_beats_the_optimum(small):
    best = small.objective(small.optimum(0.7), 0.7)
    assert best == pytest.approx(0.7 * float(small.log_partition(0.7).mean()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        near = small.optimum(0.7) + 0.1 * torch.randn(small.logps.shape, generator=generator).double()
        assert small.objective(near.log_softmax(-1), 0.7) < best


def test_kl_of_a_policy_that_never_gives_an_answer_is_finite_one_way(small):
    p = small.logps.clone()
    p[:, 0] = -torch.inf
    p = p.log_softmax(-1)
    assert bool(kl(p, small.logps).isfinite().all())
    assert bool((kl(small.logps, p) == torch.inf).all())
    assert_close(kl(p, small.logps), -small.logps[:, 0].exp().neg().log1p())  # −log of what is left


def test_the_frontier_rises_from_the_reference(small):
    frontier = small.frontier([100.0, 2.0, 1.0, 0.5, 0.25])
    assert frontier[0]["kl_policy_reference"] < 1e-3
    for lower, higher in pairwise(frontier):
        assert higher["reward"] > lower["reward"]
        assert higher["kl_policy_reference"] > lower["kl_policy_reference"]
    assert all(point["kl_optimum_policy"] == pytest.approx(0, abs=1e-14) for point in frontier)


def test_a_draw_has_the_spreads_and_the_overlap_it_was_asked_for():
    """Before the mismatch: σ within 1.5, between 0.5, exactly; overlap to 1e-5; the same seed is the same world."""
    options = dict(prompts=6, letters=3, tokens=3, overlap=0.3, spread=1.5, offset=0.5)
    world = draw(1, **options)
    assert world.within_deviation() == pytest.approx(1.5)
    assert world.between_deviation() == pytest.approx(0.5)
    assert world.overlap() == pytest.approx(0.3, abs=1e-5)
    worse = draw(1, mismatch=4.0, **options)
    assert_close(world.rewards - worse.rewards, 4 * foreign(world.logps))
    assert_close(draw(1, **options).rewards, world.rewards, rtol=0, atol=0)
    assert not torch.equal(draw(2, **options).rewards, world.rewards)


def test_overlap_and_foreign_by_hand():
    """(.5, .5, 0) and (0, .5, .5) share .5. The mean over both: (.25, .5, .25). Under the first prompt the third answer
    is all foreign. (.2, .8) beside (.6, .4): the mean is (.4, .6), of which the first answer has half, the last 2/3."""
    first, second = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.0, 0.5, 0.5]).double()
    logps = torch.stack([first, second]).log()
    assert mean_overlap(logps) == pytest.approx(0.5)
    assert_close(foreign(logps), torch.tensor([[0.0, 0, 1], [1, 0, 0]]).double())
    half = foreign(torch.tensor([[0.2, 0.8], [0.6, 0.4]]).double().log())
    assert_close(half, torch.tensor([[0.5, 0.0], [0.0, 1 / 3]]).double())


def test_an_overlap_out_of_reach_is_said():
    with pytest.raises(ValueError, match=r"overlap by more than 0\.001; give more letters or tokens"):
        draw(0, prompts=4, letters=1, tokens=1, overlap=0.001)


def test_samples_follow_their_policy(small):
    """40,000 draws of each prompt: within 5 standard errors of the probabilities, from π_ref and from π*."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(len(small))[:, None].expand(-1, 40_000)
    for policy in (None, small.optimum(0.5)):
        found = small.sample(prompts, generator, policy)
        share = torch.nn.functional.one_hot(found, small.logps.shape[1]).double().mean(1)
        p = (small.logps if policy is None else policy).exp()
        assert bool(((share - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt() + 1e-9).all())


def test_a_table_holds_every_response_under_every_prompt(small):
    prompts, responses = torch.tensor([2, 0, 2, 1]), torch.tensor([5, 0, 14, 3])
    table = small.table(prompts, responses, torch.tensor([[3, 0], [1, 2]]))
    assert table.group.tolist() == [2, 0, 2, 1]
    assert table.length.tolist() == [3, 1, 3, 3]
    assert table.cross_rewards[0, 0, 1] == small.rewards[1, 5]  # row 3's prompt, row 0's answer
    assert table.cross_logps[1, 1, 0] == small.logps[2, 0]
    assert table.rewards[2] == small.rewards[2, 14]
    assert table.reference_logps[3] == small.logps[1, 3]
    assert InBatch()(table, 1.0).shape == (4,)


@pytest.mark.parametrize("name", WORLDS)
def test_the_worlds_of_the_method(name):
    overlap, spread = {"shared": (0.72, 1.0), "apart": (0.08, 1.05), "long": (0.14, 1.15)}[name]
    world = WORLDS[name](0)
    assert len(world) == 40
    assert world.overlap() == pytest.approx(overlap, abs=1e-3)
    assert world.within_deviation() == pytest.approx(spread, abs=0.02)
    assert int(world.responses.length.max()) == (7 if name == "long" else 5)
    mixture = world.logps.exp().mean(0)
    mismatched = float((mixture * world.rewards).sum(-1).mean())
    assert (mismatched < -2.5) == (name != "shared")
    assert float(expectation(world.logps, world.rewards).mean()) > -0.2
