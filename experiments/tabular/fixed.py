"""Where each weight leads if the policy is a table: π_fix(y|x) ∝ π_ref(y|x) E[w | x, y] (docs/method.md).

The row itself is held fixed. The expectation is over the others in its micro-batch, B − 1 pairs with uniform prompts
and y_j ~ π_ref(·|x_j), or over the others in its group, K − 1 responses of π_ref to x. All responses to a prompt see
the same draws, so most of the noise is common to them and cancels in π_fix. Weights come from
`var.weights.estimators`. The few that are not an estimator of the package are functions here.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from experiments.tabular.worlds import WORLDS, Record, draw_micro_batches
from var.testbed.world import World, expectation
from var.weights.estimators import Grouped, InBatch, Sampled, in_batch_log_weights
from var.weights.inputs import WeightInputs

Weigher = Callable[[World, int, float, int, torch.Generator], Tensor]
"""From a world, B or K, λ, the number of draws and a generator to [P, Y], the log of the mean weight over draws."""

CHUNK = 4_000_000
"""Numbers held in memory at once."""


def make_in_batch(estimator: InBatch) -> Weigher:
    """Return E[w | x, y] of the package's in-batch weight."""

    def weigh(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
        return torch.stack([prompt_row(world, p, size, temperature, draws, generator) for p in range(len(world))])

    def prompt_row(
        world: World, prompt: int, size: int, temperature: float, draws: int, generator: torch.Generator
    ) -> Tensor:
        x, y = draw_micro_batches(world, draws, size - 1, generator)
        r, s = world.rewards[prompt] / temperature, score_own(world, estimator)[prompt]
        scores = s[y] if estimator.reference == "cross" else score_own(world, estimator)[x, y]

        def log_weights(rows: Tensor) -> Tensor:
            # [rows, draws]: only this prompt's row of the micro-batch is computed, with its own response in column 0
            shape = (len(rows), draws, 1, size)
            rewards, logps = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
            rewards[..., 0], rewards[..., 1:] = r[rows, None, None], r[y][:, None]
            logps[..., 0], logps[..., 1:] = s[rows, None, None], scores[:, None]
            found = in_batch_log_weights(rewards, logps)[..., 0]
            return found if estimator.reference_in_numerator else found - s[rows, None]

        return average_draws(log_weights, len(r), draws * size)

    return weigh


def score_own(world: World, estimator: InBatch) -> Tensor:
    """Return [P, Y], the estimator's s: log π_ref(y|x) summed or averaged over tokens, or 0."""
    if estimator.reduction == "none":
        return torch.zeros_like(world.logps)
    return world.logps / world.responses.length if estimator.reduction == "mean" else world.logps


def weigh_grouped(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """Return E[w | x, y] of the package's group weight, K = size."""

    def prompt_row(prompt: int) -> Tensor:
        y = world.sample(torch.full((draws, size - 1), prompt), generator)

        def log_weights(rows: Tensor) -> Tensor:
            answers = torch.empty(len(rows), draws, size, dtype=torch.long)
            answers[..., 0], answers[..., 1:] = rows[:, None], y
            group = torch.arange(len(rows) * draws).repeat_interleave(size)
            rewards = world.rewards[prompt][answers.reshape(-1)]
            found = Grouped(drop_zero_variance=False)(
                WeightInputs(rewards=rewards, group=group, length=group), temperature
            )
            return found.reshape(answers.shape)[..., 0]

        return average_draws(log_weights, world.logps.shape[1], draws * size)

    return torch.stack([prompt_row(p) for p in range(len(world))])


def weigh_equally(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """Return the weight 1 of SFT."""
    return torch.zeros_like(world.logps)


def weigh_exactly(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """Return e^{r/λ} / Z(x) with the exact Z."""
    return world.rewards / temperature - world.log_partition(temperature)[:, None]


def weigh_global(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """Return e^{r/λ} divided by the same number for all prompts."""
    return world.rewards / temperature - world.log_partition(temperature).logsumexp(0) + math.log(len(world))


def weigh_sampled(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """Return E[w | x, y] of the package's weight with Z from K other responses of π_ref."""
    prompts = torch.arange(len(world))[:, None, None].expand(-1, draws, size)
    candidates = world.rewards[prompts, world.sample(prompts, generator)].reshape(-1, size)
    group = torch.arange(len(candidates))
    rows = WeightInputs(rewards=torch.zeros(len(group)).double(), group=group, length=group, candidates=candidates)
    inverse = Sampled(candidates=size, cap=None)(rows, temperature).reshape(len(world), draws)  # −log Ẑ: r = 0
    return world.rewards / temperature + (inverse.logsumexp(-1) - math.log(draws))[:, None]


def weigh_leave_one_out(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """Return the weight with Z from the K − 1 other responses of the group."""
    return weigh_sampled(world, size - 1, temperature, draws, generator)


def weigh_balance(world: World, size: int, temperature: float, draws: int, generator: torch.Generator) -> Tensor:
    """Return e^{r/λ} / Ẑ with Ẑ_i = Σ_j [π_ref(y_j|x_i) / Σ_k π_ref(y_j|x_k)] e^{r_ij/λ}, unbiased but not for use."""

    def prompt_row(prompt: int) -> Tensor:
        x, y = draw_micro_batches(world, draws, size - 1, generator)
        r, s = world.rewards[prompt] / temperature, world.logps[prompt]
        mixture = torch.logaddexp(world.logps[x[:, :, None], y[:, None, :]].logsumexp(1), s[y])
        rest = (s[y] - mixture + r[y]).logsumexp(-1)

        def log_weights(rows: Tensor) -> Tensor:
            crowd = world.logps[x[..., None], rows].logsumexp(1).T  # [rows, draws], of the others
            own = s[rows, None] - torch.logaddexp(s[rows, None], crowd) + r[rows, None]
            return r[rows, None] - torch.logaddexp(own, rest)

        return average_draws(log_weights, len(r), draws * size)

    return torch.stack([prompt_row(p) for p in range(len(world))])


def average_draws(log_weights: Callable[[Tensor], Tensor], count: int, cost: int) -> Tensor:
    """Return [count], the log of the mean over draws of `log_weights(rows)` [rows, draws].

    `cost` is the numbers that one row holds in memory. Rows are computed in chunks.
    """
    chunks = torch.arange(count).split(max(1, CHUNK // cost))
    found = [log_weights(rows) for rows in chunks]
    return torch.cat([f.logsumexp(-1) - math.log(f.shape[-1]) for f in found])


def find_fixed_point(world: World, log_weight: Tensor) -> Tensor:
    """Return log π_fix [P, Y] in nats, from log E[w | x, y] of shape [P, Y]. The data comes from π_ref."""
    return (world.logps + log_weight).log_softmax(-1)


ESTIMATORS: Mapping[str, Weigher] = {
    "sft": weigh_equally,
    "in_batch sum": make_in_batch(InBatch(reduction="sum")),
    "in_batch mean": make_in_batch(InBatch(reduction="mean")),
    "in_batch none": make_in_batch(InBatch(reduction="none")),
    "in_batch sum, own": make_in_batch(InBatch(reduction="sum", reference="own")),
    "in_batch mean, own": make_in_batch(InBatch(reduction="mean", reference="own")),
    "in_batch mean, not in the numerator": make_in_batch(InBatch(reduction="mean", reference_in_numerator=False)),
    "in_batch sum, not in the numerator": make_in_batch(InBatch(reduction="sum", reference_in_numerator=False)),
    "balance": weigh_balance,
    "grouped": weigh_grouped,
    "leave-one-out": weigh_leave_one_out,
    "sampled": weigh_sampled,
    "global": weigh_global,
    "exact": weigh_exactly,
}


def measure(
    world: World, name: str, size: int, temperature: float, *, draws: int = 200, blocks: int = 8, seed: int = 0
) -> Record:
    """Return where one estimator leads in one world, with standard errors from a jackknife over blocks of draws."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.stack([ESTIMATORS[name](world, size, temperature, draws // blocks, generator) for _ in range(blocks)])

    def numbers(log_weight: Tensor) -> Record:
        mean = float(expectation(world.logps, log_weight.exp()).mean())
        return {**world.summary(find_fixed_point(world, log_weight), temperature), "mean_weight": mean}

    def average(kept: Tensor) -> Tensor:
        return kept.logsumexp(0) - math.log(len(kept))

    found = numbers(average(parts))
    left_out = [numbers(average(torch.cat([parts[:b], parts[b + 1 :]]))) for b in range(blocks)]
    spread = {
        f"{key}_error": float(torch.tensor([record[key] for record in left_out]).double().std(unbiased=False))
        * (blocks - 1) ** 0.5
        for key in found
    }
    return {"estimator": name, "size": size, "temperature": temperature, **found, **spread}


SETTINGS: tuple[tuple[str, int, float], ...] = (  # estimator, B or K, λ
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


def make_table(
    *,
    worlds: Iterable[str] = tuple(WORLDS),
    seeds: Iterable[int] = (0, 1, 2),
    settings: Iterable[tuple[str, int, float]] = SETTINGS,
    draws: int = 200,
    **options: int,
) -> list[Record]:
    """Return a record per world, seed and setting. `options` are arguments of `draw_world`, to make it smaller."""
    return [
        {"world": name, "seed": seed, **measure(world, *setting, draws=draws, seed=seed)}
        for name in worlds
        for seed in seeds
        for world in (WORLDS[name](seed, **options),)
        for setting in settings
    ]
