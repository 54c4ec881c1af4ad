"""Where each weight leads over tables: π_fix(y|x) ∝ π_ref(y|x) E[w | x, y] (docs/method.md).

The expectation is over what else stands in the row's micro-batch, B − 1 pairs with prompts drawn uniformly and
y_j ~ π_ref(·|x_j), or in its group, K − 1 other answers of π_ref to x; the row itself is held fixed. All answers of a
prompt see the same draws, whose noise is then largely common to them and falls out of π_fix. Weights come from
var.weights.estimators; the few that are no estimator of the package stand here, a function each.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from var.testbed.world import WORLDS, Record, World, expectation
from var.weights.estimators import Grouped, InBatch, Sampled, in_batch_log_weights
from var.weights.table import Table

Weigher = Callable[[World, int, float, int, torch.Generator], Tensor]

"""(world, B or K, λ, draws, generator) → [P, Y] log of the mean weight over the draws."""


CHUNK = 4_000_000  # numbers held at once


def in_batch(estimator: InBatch, numerator: bool = True) -> Weigher:
    """E[w | x, y] of the package's in-batch weight. numerator: off for π_ref left out of the numerator alone."""

    def weigh(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
        return torch.stack([prompt_row(world, p, size, temperature, draws, generator) for p in range(len(world))])

    def prompt_row(
        world: World, prompt: int, size: int, temperature: float, draws: int, generator: torch.Generator
    ) -> Tensor:
        x, y = world.micro_batches(draws, size - 1, generator)
        r, s = world.rewards[prompt] / temperature, own_scores(world, estimator)[prompt]
        scores = s[y] if estimator.reference == "cross" else own_scores(world, estimator)[x, y]

        def log_weights(rows: Tensor) -> Tensor:
            """[rows, draws]: only the micro-batch's row of this prompt is laid out, its own answer in column 0."""
            shape = (len(rows), draws, 1, size)
            rewards, logps = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
            rewards[..., 0], rewards[..., 1:] = r[rows, None, None], r[y][:, None]
            logps[..., 0], logps[..., 1:] = s[rows, None, None], scores[:, None]
            found = in_batch_log_weights(rewards, logps)[..., 0]
            return found if numerator else found - s[rows, None]

        return log_mean(log_weights, len(r), draws * size)

    return weigh


def own_scores(world: World, estimator: InBatch) -> Tensor:
    """[P, Y]: the s of `estimator`, log π_ref(y|x) summed, averaged over tokens, or nothing."""
    if estimator.reduction == "none":
        return torch.zeros_like(world.logps)
    return world.logps / world.responses.length if estimator.reduction == "mean" else world.logps


def grouped(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """E[w | x, y] of the package's group weight, K = size."""

    def prompt_row(prompt: int) -> Tensor:
        y = world.sample(torch.full((draws, size - 1), prompt), generator)

        def log_weights(rows: Tensor) -> Tensor:
            answers = torch.empty(len(rows), draws, size, dtype=torch.long)
            answers[..., 0], answers[..., 1:] = rows[:, None], y
            group = torch.arange(len(rows) * draws).repeat_interleave(size)
            rewards = world.rewards[prompt][answers.reshape(-1)]
            found = Grouped()(Table(rewards=rewards, group=group, length=group), temperature)
            return found.reshape(answers.shape)[..., 0]

        return log_mean(log_weights, world.logps.shape[1], draws * size)

    return torch.stack([prompt_row(p) for p in range(len(world))])


def one(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """SFT: w = 1."""
    return torch.zeros_like(world.logps)


def exact(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """e^{r/λ} / Z(x), Z summed."""
    return world.rewards / temperature - world.log_partition(temperature)[:, None]


def constant(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """`global`: e^{r/λ} over a number that no prompt has to itself."""
    return world.rewards / temperature - world.log_partition(temperature).logsumexp(0) + math.log(len(world))


def sampled(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """E[w | x, y] of the package's weight against K fresh answers of π_ref, which the row is not among."""
    prompts = torch.arange(len(world))[:, None, None].expand(-1, draws, size)
    candidates = world.rewards[prompts, world.sample(prompts, generator)].reshape(-1, size)
    group = torch.arange(len(candidates))
    rows = Table(rewards=torch.zeros(len(group)).double(), group=group, length=group, candidates=candidates)
    inverse = Sampled(candidates=size, cap=None)(rows, temperature).reshape(len(world), draws)  # −log Ẑ: r = 0
    return world.rewards / temperature + (inverse.logsumexp(-1) - math.log(draws))[:, None]


def leave_one_out(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """e^{r/λ} over the mean of the group's other answers: K − 1 answers of π_ref that are not the row's own."""
    return sampled(world, size - 1, temperature, draws, generator)


def balance(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """e^{r/λ} / Ẑ, Ẑ_i = Σ_j [π_ref(y_j|x_i) / Σ_k π_ref(y_j|x_k)] e^{r_ij/λ}: unbiased, and not for use."""

    def prompt_row(prompt: int) -> Tensor:
        x, y = world.micro_batches(draws, size - 1, generator)
        r, s = world.rewards[prompt] / temperature, world.logps[prompt]
        mixture = torch.logaddexp(world.logps[x[:, :, None], y[:, None, :]].logsumexp(1), s[y])
        rest = (s[y] - mixture + r[y]).logsumexp(-1)

        def log_weights(rows: Tensor) -> Tensor:
            crowd = world.logps[x[..., None], rows].logsumexp(1).T  # [rows, draws]: of the others
            own = s[rows, None] - torch.logaddexp(s[rows, None], crowd) + r[rows, None]
            return r[rows, None] - torch.logaddexp(own, rest)

        return log_mean(log_weights, len(r), draws * size)

    return torch.stack([prompt_row(p) for p in range(len(world))])


def log_mean(log_weights: Callable[[Tensor], Tensor], count: int, cost: int) -> Tensor:
    """[count]: log of the mean over draws of `log_weights`(rows) [rows, draws], so many rows at a time."""
    chunks = torch.arange(count).split(max(1, CHUNK // cost))
    found = [log_weights(rows) for rows in chunks]
    return torch.cat([f.logsumexp(-1) - math.log(f.shape[-1]) for f in found])


def fixed_point(world: World, log_weight: Tensor) -> Tensor:
    """[P, Y] log E[w | x, y] → [P, Y] nats: log π_fix, where data comes from π_ref."""
    return (world.logps + log_weight).log_softmax(-1)


ESTIMATORS: Mapping[str, Weigher] = {
    "sft": one,
    "in_batch sum": in_batch(InBatch(reduction="sum")),
    "in_batch mean": in_batch(InBatch(reduction="mean")),
    "in_batch none": in_batch(InBatch(reduction="none")),
    "in_batch sum, own": in_batch(InBatch(reduction="sum", reference="own")),
    "in_batch mean, own": in_batch(InBatch(reduction="mean", reference="own")),
    "in_batch mean, not in the numerator": in_batch(InBatch(reduction="mean"), numerator=False),
    "in_batch sum, not in the numerator": in_batch(InBatch(reduction="sum"), numerator=False),
    "balance": balance,
    "grouped": grouped,
    "leave-one-out": leave_one_out,
    "sampled": sampled,
    "global": constant,
    "exact": exact,
}


def record(
    world: World, name: str, size: int, temperature: float, *, draws: int = 200, blocks: int = 8, seed: int = 0
) -> Record:
    """One estimator's fixed point in one world. *_error: the standard error from the draws, a jackknife over blocks."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.stack([ESTIMATORS[name](world, size, temperature, draws // blocks, generator) for _ in range(blocks)])

    def numbers(log_weight: Tensor) -> Record:
        mean = float(expectation(world.logps, log_weight.exp()).mean())
        return {**world.summary(fixed_point(world, log_weight), temperature), "mean_weight": mean}

    def average(kept: Tensor) -> Tensor:
        return kept.logsumexp(0) - math.log(len(kept))

    whole = numbers(average(parts))
    left_out = [numbers(average(torch.cat([parts[:b], parts[b + 1 :]]))) for b in range(blocks)]
    spread = {
        f"{key}_error": float(torch.tensor([one[key] for one in left_out]).double().std(unbiased=False))
        * (blocks - 1) ** 0.5
        for key in whole
    }
    return {"estimator": name, "size": size, "temperature": temperature, **whole, **spread}


SETTINGS: tuple[tuple[str, int, float], ...] = (
    *((name, 8, 1.0) for name in ESTIMATORS),
    ("grouped", 2, 1.0),
    ("in_batch mean", 2, 1.0),
    ("in_batch mean", 4, 1.0),
    ("in_batch mean", 32, 1.0),
    ("in_batch sum", 32, 1.0),
    ("in_batch none", 32, 1.0),
    ("sft", 8, 2.0),
    ("in_batch sum", 32, 2.0),
    ("sft", 8, 0.5),
    ("in_batch mean", 8, 0.5),
)


def table(
    *,
    worlds: Iterable[str] = tuple(WORLDS),
    seeds: Iterable[int] = (0, 1, 2),
    settings: Iterable[tuple[str, int, float]] = SETTINGS,
    draws: int = 200,
    **options: int,
) -> list[Record]:
    """A record for each world, seed and setting. options: draw's, to make it small."""
    return [
        {"world": name, "seed": seed, **record(world, *setting, draws=draws, seed=seed)}
        for name in worlds
        for seed in seeds
        for world in (WORLDS[name](seed, **options),)
        for setting in settings
    ]
