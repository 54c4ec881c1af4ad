"""The worlds of the studies: random prompts and rewards with a set overlap between prompts and set reward spreads."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from var.testbed.world import Responses, World, expectation

Record = dict[str, Any]
"""One row of a study's table: settings, and the numbers measured at them."""


def draw_world(
    seed: int,
    *,
    prompts: int = 40,
    letters: int = 3,
    tokens: int = 5,
    overlap: float = 0.72,
    spread: float = 1.0,
    offset: float = 1.0,
    mismatch: float = 0.0,
    features: int = 8,
) -> World:
    """Return the world of a seed. Half of the rewards' variance is the response's own, half depends on its prompt.

    Args:
        seed: the same seed and settings give the same world.
        prompts: P.
        letters: the size of the alphabet.
        tokens: the most tokens of a response.
        overlap: of two prompts' π_ref, the mean of `mean_overlap` over the first 128 prompts. It is met by scaling how
            far the prompts' logits differ. They differ less in later tokens, or each prompt would have one response.
        spread: the reward's standard deviation within a prompt under π_ref, pooled, before the mismatch.
        offset: the standard deviation between prompts of the mean reward, before the mismatch.
        mismatch: how much lower, at most, a response of another prompt scores. `foreignness` is the fraction of it.
        features: F, the number of a prompt's features.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    space = Responses(letters, tokens)
    x = normal(prompts, features)
    shared = normal(space.prefixes, letters + 1)
    own = (x @ normal(features, space.prefixes * (letters + 1)) / features**0.5).reshape(prompts, *shared.shape)
    own = own * 0.6 ** space.depth[: space.prefixes, None]
    scale = find_scale(lambda s: mean_overlap(space.logps(shared + s * own[:128])), overlap)
    logits = shared + scale * own
    logps = space.logps(logits)

    count = len(space.depth)
    quality = normal(count) + x @ normal(features, count) / features**0.5
    quality = quality - expectation(logps, quality)[:, None]
    quality = spread * quality / expectation(logps, quality.square()).mean().sqrt()
    offsets = x @ normal(features) / features**0.5 + normal(prompts)
    offsets = offset * (offsets - offsets.mean()) / offsets.std(unbiased=False)
    rewards = offsets[:, None] + quality - mismatch * foreignness(logps)
    return World(responses=space, logits=logits, features=x, rewards=rewards)


def find_scale(overlap_at: Callable[[float], float], target: float) -> float:
    """Return the scale at which a decreasing overlap equals the target, by bisection."""
    low, high = 0.0, 1.0
    while overlap_at(high) > target:
        low, high = high, 2 * high
        if high > 64:  # above it each prompt has one response
            raise ValueError(f"prompts of this draw overlap by more than {target}; use more letters or tokens")
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap_at(middle) > target else (low, middle)
    return (low + high) / 2


def mean_overlap(logps: Tensor) -> float:
    """Return Σ_y min(p_i, p_j) of log-probabilities [P, Y], averaged over pairs of different rows."""
    p = logps.exp()
    count = len(p)
    total = sum(float(torch.minimum(p[i], p[i + 1 :]).sum()) for i in range(count - 1))
    return total / (count * (count - 1) / 2)


def foreignness(logps: Tensor) -> Tensor:
    """Return [P, Y] in [0, 1], how much a response is another prompt's, of log π_ref [P, Y].

    It is 1 − π_ref(y|x) / mean_x' π_ref(y|x'), and 0 where that is negative.
    """
    typical = logps.logsumexp(0) - torch.tensor(len(logps)).log()
    return 1 - (logps - typical).exp().clamp(max=1)


def make_shared_world(seed: int = 0, **options: Any) -> World:
    """Return a world of prompts that overlap, so that responses also answer other prompts."""
    return draw_world(seed, **{"overlap": 0.72, "tokens": 5, **options})


def make_apart_world(seed: int = 0, **options: Any) -> World:
    """Return a world of prompts with their own responses. Another prompt's response scores up to 4 lower."""
    return draw_world(seed, **{"overlap": 0.08, "tokens": 5, "letters": 4, "mismatch": 4.0, **options})


def make_long_world(seed: int = 0, **options: Any) -> World:
    """Return a world like the "apart" one with longer responses."""
    return draw_world(seed, **{"overlap": 0.14, "tokens": 7, "mismatch": 4.0, **options})


WORLDS = {"shared": make_shared_world, "apart": make_apart_world, "long": make_long_world}


def draw_micro_batches(world: World, number: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return prompts and responses [M, B] int: prompts uniform with replacement, y_j ~ π_ref(·|x_j)."""
    prompts = torch.randint(len(world), (number, size), generator=generator)
    return prompts, world.sample(prompts, generator)


def select_prompts(world: World, prompts: slice) -> World:
    """Return the world of some of the prompts."""
    return World(
        responses=world.responses, logits=world.logits[prompts], rewards=world.rewards[prompts],
        features=world.features[prompts],
    )  # fmt: skip


def trace_frontier(world: World, temperatures: Iterable[float]) -> list[Record]:
    """Return π* at each λ: the most reward at its KL(π ‖ π_ref). No policy lies above it."""
    return [{"temperature": t, **world.summary(world.optimum(t), t)} for t in temperatures]
