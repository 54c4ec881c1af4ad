"""How accurate each estimate of Z(x) is, by estimator and B: the paper's Table 7 and Figure 4 (arXiv 2502.11026).

The prompt is fixed. The micro-batch that contains it is random: its own response and B − 1 other pairs with
y_j ~ π_ref(·|x_j). Each Ẑ is computed from the package's own weight: log Ẑ = s_ii + r_ii/λ − log w_i.

Each Ẑ has the scale at which it would be right if its assumption held. For `none` it is the mean of e^{r_ij/λ}. For
`sum` the factor Y is the uniform distribution over responses that Eq. 9 assumes. Token means have no such scale.
Weights are divided by their mean over the data set, so a bias that is common to all prompts is harmless. Its spread
over prompts is not.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from experiments.tabular.fixed import score_own
from experiments.tabular.worlds import WORLDS, Record, draw_micro_batches
from var.testbed.world import World
from var.weights.estimators import Grouped, InBatch, Sampled, in_batch_log_weights
from var.weights.inputs import WeightInputs

Partition = Callable[[World, Tensor, int, float, torch.Generator], Tensor]
"""From a world, own responses [P, M], B or K, λ and a generator to [P, M], log Ẑ(x).

Each of the M micro-batches or groups contains one of the own responses.
"""


def make_in_batch(estimator: InBatch) -> Partition:
    """Return Ẑ of the package's in-batch weight."""

    def log_partition(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
        x, y = draw_micro_batches(world, own.numel(), size - 1, generator)
        prompt = torch.arange(len(world))[:, None].expand_as(own).reshape(-1, 1)
        prompts, responses = torch.cat([prompt, x], 1), torch.cat([own.reshape(-1, 1), y], 1)
        rewards = world.rewards[prompt, responses] / temperature
        rows = prompt if estimator.reference == "cross" else prompts
        logps = score_own(world, estimator)[rows, responses]
        log_weights = in_batch_log_weights(rewards[:, None], logps[:, None])[:, 0]  # the prompt's row of the B
        responses_in_all = world.logps.shape[1] if estimator.reduction == "sum" else 1
        found = logps[:, 0] + rewards[:, 0] - log_weights + math.log(responses_in_all / size)
        return found.reshape(own.shape)

    return log_partition


def estimate_grouped(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Return log Ẑ from K responses to the prompt, the row's own among them."""
    prompt = torch.arange(len(world))[:, None, None].expand(*own.shape, size)
    responses = torch.cat([own[..., None], world.sample(prompt[..., 1:], generator)], -1)
    rewards = world.rewards[prompt, responses]
    group = torch.arange(own.numel()).repeat_interleave(size)
    log_weights = Grouped(drop_zero_variance=False)(
        WeightInputs(rewards=rewards.reshape(-1), group=group, length=group), temperature
    )
    return rewards[..., 0] / temperature - log_weights.reshape(rewards.shape)[..., 0]


def estimate_sampled(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Return log Ẑ from K other responses of π_ref."""
    prompt = torch.arange(len(world))[:, None, None].expand(*own.shape, size)
    candidates = world.rewards[prompt, world.sample(prompt, generator)].reshape(-1, size)
    rewards, group = world.rewards[prompt[..., 0], own], torch.arange(own.numel())
    rows = WeightInputs(rewards=rewards.reshape(-1), group=group, length=group, candidates=candidates)
    log_weights = Sampled(candidates=size, cap=None)(rows, temperature)
    return rewards / temperature - log_weights.reshape(own.shape)


def estimate_leave_one_out(
    world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Return log Ẑ from the K − 1 other responses of the group."""
    return estimate_sampled(world, own, size - 1, temperature, generator)


def estimate_balance(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Return log Σ_j [π_ref(y_j|x_i) / Σ_k π_ref(y_j|x_k)] e^{r_ij/λ}.

    This is multiple importance sampling with the balance heuristic.
    """
    x, y = draw_micro_batches(world, own.numel(), size - 1, generator)
    prompt = torch.arange(len(world))[:, None].expand_as(own).reshape(-1, 1)
    prompts, responses = torch.cat([prompt, x], 1), torch.cat([own.reshape(-1, 1), y], 1)
    mixture = world.logps[prompts[:, :, None], responses[:, None, :]].logsumexp(1)
    terms = world.logps[prompt, responses] - mixture + world.rewards[prompt, responses] / temperature
    return terms.logsumexp(-1).reshape(own.shape)


PARTITIONS: Mapping[str, Partition] = {
    "in_batch sum": make_in_batch(InBatch(reduction="sum")),
    "in_batch mean": make_in_batch(InBatch(reduction="mean")),
    "in_batch none": make_in_batch(InBatch(reduction="none")),
    "in_batch sum, own": make_in_batch(InBatch(reduction="sum", reference="own")),
    "in_batch mean, own": make_in_batch(InBatch(reduction="mean", reference="own")),
    "balance": estimate_balance,
    "grouped": estimate_grouped,
    "leave-one-out": estimate_leave_one_out,
    "sampled": estimate_sampled,
}


def measure(world: World, name: str, size: int, temperature: float, *, draws: int = 4000, seed: int = 0) -> Record:
    """Return the accuracy of one estimate in one world, averaged over prompts.

    - relative_bias: E[Ẑ]/Z − 1.
    - variance: Var(Ẑ)/Z², which is small if Ẑ is small.
    - relative_variance: Var(Ẑ)/E[Ẑ]², which does not depend on the scale of Ẑ.
    - log_bias, log_variance: E[log Ẑ] − log Z and Var(log Ẑ).
    - log_bias_spread: the standard deviation of log_bias over prompts.
    - own_correlation: of log Ẑ with the row's own r/λ. If it is positive, the optimum is pulled back to π_ref.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.arange(len(world))[:, None].expand(-1, draws)
    own = world.sample(prompt, generator)
    logs = PARTITIONS[name](world, own, size, temperature, generator)
    error = logs - world.log_partition(temperature)[:, None]
    ratio, rewards = error.exp(), world.rewards[prompt, own]
    bias = error.mean(1)
    centered, high = logs - logs.mean(1, keepdim=True), rewards - rewards.mean(1, keepdim=True)
    varies = (centered.abs().amax(1) > 1e-9) & (
        high.abs().amax(1) > 1e-9
    )  # otherwise the correlation is rounding noise
    spread = (centered.square().sum(1) * high.square().sum(1)).sqrt()
    return {
        "estimator": name,
        "size": size,
        "temperature": temperature,
        "relative_bias": float(ratio.mean() - 1),
        "relative_bias_error": float((ratio.var(1) / draws).mean().sqrt() / len(world) ** 0.5),
        "variance": float(ratio.var(1).mean()),
        "relative_variance": float((ratio.var(1) / ratio.mean(1).square()).mean()),
        "log_bias": float(bias.mean()),
        "log_bias_spread": float(bias.std(unbiased=False)),
        "log_variance": float(error.var(1).mean()),
        "own_correlation": float(((centered * high).sum(1) / spread)[varies].mean()),
    }


def make_table(
    *,
    worlds: Iterable[str] = tuple(WORLDS),
    seeds: Iterable[int] = (0, 1, 2),
    sizes: Iterable[int] = (2, 4, 8, 16, 32),
    temperature: float = 1.0,
    draws: int = 4000,
    **options: int,
) -> list[Record]:
    """Return a record per world, seed, estimator and B or K. `options` are arguments of `draw_world`."""
    return [
        {"world": name, "seed": seed, **measure(world, estimator, size, temperature, draws=draws, seed=seed)}
        for name in worlds
        for seed in seeds
        for world in (WORLDS[name](seed, **options),)
        for estimator in PARTITIONS
        for size in sizes
    ]
