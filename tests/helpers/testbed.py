"""Worlds and rows of the exact testbed for tests."""

import torch
from torch import Tensor

from var.testbed.rows import Rows
from var.testbed.world import Responses, World, expectation


def random_world(seed: int, *, prompts: int = 4, letters: int = 2, tokens: int = 3, features: int = 2) -> World:
    """Return a world whose logits, rewards and features are independent and standard normal."""
    generator = torch.Generator().manual_seed(seed)
    space = Responses(letters, tokens)
    logits, rewards, known = (
        torch.randn(prompts, *shape, dtype=torch.float64, generator=generator)
        for shape in ((space.prefixes, letters + 1), (len(space.depth),), (features,))
    )
    return World(responses=space, logits=logits, rewards=rewards, features=known)


def one_step_world(logits: list[float], rewards: list[float]) -> World:
    """Return a world of one prompt whose responses have one token."""
    scores = torch.tensor([rewards], dtype=torch.float64)
    table = torch.tensor([[logits]], dtype=torch.float64)
    return World(responses=Responses(len(rewards) - 1, 1), logits=table, rewards=scores, features=scores)


def every_row(world: World, weights: Tensor) -> Rows:
    """Return all P · Y rows, with weights [P, Y] multiplied by π_ref(y|x).

    For a loss that is linear in its weights this batch is the expectation over the reference's responses.
    """
    count = world.logps.shape[1]
    prompts = torch.arange(len(world)).repeat_interleave(count)
    return Rows(
        prompts=prompts, responses=torch.arange(count).repeat(len(world)), group=prompts, unit=1,
        columns={"weights": (count * world.logps.exp() * weights).flatten()},
    )  # fmt: skip


def within_deviation(world: World) -> float:
    """Return the reward's standard deviation under π_ref, pooled over prompts."""
    mean = expectation(world.logps, world.rewards)
    return float(expectation(world.logps, (world.rewards - mean[:, None]).square()).mean().sqrt())


def between_deviation(world: World) -> float:
    """Return the standard deviation over prompts of E_{π_ref}[r]."""
    return float(expectation(world.logps, world.rewards).std(unbiased=False))
