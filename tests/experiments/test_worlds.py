"""The worlds of the studies: overlap and reward spreads are as requested."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from experiments.tabular.worlds import WORLDS, draw_world, foreignness, mean_overlap, trace_frontier
from tests.helpers.testbed import between_deviation, one_step_world, within_deviation
from var.testbed.world import expectation


def test_a_world_has_the_requested_spreads_and_overlap():
    """Spreads are exact before the mismatch, the overlap to 1e-5. The same seed gives the same world."""
    options = dict(prompts=6, letters=3, tokens=3, overlap=0.3, spread=1.5, offset=0.5)
    world = draw_world(1, **options)
    assert within_deviation(world) == pytest.approx(1.5)
    assert between_deviation(world) == pytest.approx(0.5)
    assert mean_overlap(world.logps) == pytest.approx(0.3, abs=1e-5)
    worse = draw_world(1, mismatch=4.0, **options)
    assert_close(world.rewards - worse.rewards, 4 * foreignness(world.logps))
    assert_close(draw_world(1, **options).rewards, world.rewards, rtol=0, atol=0)
    assert not torch.equal(draw_world(2, **options).rewards, world.rewards)


def test_overlap_and_foreignness_by_hand():
    """(.5, .5, 0) and (0, .5, .5) overlap by .5, and their mean is (.25, .5, .25).

    The mean of (.2, .8) and (.6, .4) is (.4, .6). Of it the first prompt has 1/2 at the first response, the second
    prompt 2/3 at the second.
    """
    first, second = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.0, 0.5, 0.5]).double()
    logps = torch.stack([first, second]).log()
    assert mean_overlap(logps) == pytest.approx(0.5)
    assert_close(foreignness(logps), torch.tensor([[0.0, 0, 1], [1, 0, 0]]).double())
    half = foreignness(torch.tensor([[0.2, 0.8], [0.6, 0.4]]).double().log())
    assert_close(half, torch.tensor([[0.5, 0.0], [0.0, 1 / 3]]).double())


def test_an_overlap_out_of_reach_is_an_error():
    with pytest.raises(ValueError, match=r"overlap by more than 0\.001; use more letters or tokens"):
        draw_world(0, prompts=4, letters=1, tokens=1, overlap=0.001)


def test_spread_within_a_prompt_by_hand():
    assert within_deviation(one_step_world([0.0, 0.0], [math.log(3), 0.0])) == pytest.approx(math.log(3) / 2)


def test_the_frontier_rises_from_the_reference(small):
    frontier = trace_frontier(small, [100.0, 2.0, 1.0, 0.5, 0.25])
    assert frontier[0]["kl_policy_reference"] < 1e-3
    for lower, higher in pairwise(frontier):
        assert higher["reward"] > lower["reward"]
        assert higher["kl_policy_reference"] > lower["kl_policy_reference"]
    assert all(point["kl_optimum_policy"] == pytest.approx(0, abs=1e-14) for point in frontier)


@pytest.mark.parametrize("name", WORLDS)
def test_named_worlds_have_the_documented_overlap_and_spread(name):
    overlap, spread = {"shared": (0.72, 1.0), "apart": (0.08, 1.05), "long": (0.14, 1.15)}[name]
    world = WORLDS[name](0)
    assert len(world) == 40
    assert mean_overlap(world.logps) == pytest.approx(overlap, abs=1e-3)
    assert within_deviation(world) == pytest.approx(spread, abs=0.02)
    assert int(world.responses.length.max()) == (7 if name == "long" else 5)
    mixture = world.logps.exp().mean(0)
    mismatched = float((mixture * world.rewards).sum(-1).mean())
    assert (mismatched < -2.5) == (name != "shared")
    assert float(expectation(world.logps, world.rewards).mean()) > -0.2
