"""How well Z(x) is known, by estimator and by B: what the paper's Table 7 and Figure 4 ask (arXiv 2502.11026).

The prompt is fixed, the micro-batch that holds it is random: its own answer and B − 1 other pairs, y_j ~ π_ref(·|x_j).
Each Ẑ is read off the package's own weight: log Ẑ = s_ii + r_ii/λ − log w_i. Scales are those under which each would
be right where its assumption held: the plain mean of e^{r_ij/λ} for `none`, with π_ref(y_j|x_i), summed, against the
uniform over the Y responses that Eq. 9 assumes; token means have no such scale. Weights are divided by their mean over
the data set, so that a bias common to all prompts is harmless, and its spread over prompts is not.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from experiments.tabular.fixed import own_scores
from var.testbed.world import WORLDS, Record, World
from var.weights.estimators import Grouped, InBatch, Sampled, in_batch_log_weights
from var.weights.table import Table

Partition = Callable[[World, Tensor, int, float, torch.Generator], Tensor]

"""(world, own answers [P, M], B or K, λ, generator) → [P, M]: log Ẑ(x) of M micro-batches or groups that hold them."""


def in_batch(estimator: InBatch) -> Partition:
    def log_partition(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
        x, y = world.micro_batches(own.numel(), size - 1, generator)
        prompt = torch.arange(len(world))[:, None].expand_as(own).reshape(-1, 1)
        prompts, responses = torch.cat([prompt, x], 1), torch.cat([own.reshape(-1, 1), y], 1)
        rewards = world.rewards[prompt, responses] / temperature
        rows = prompt if estimator.reference == "cross" else prompts
        logps = own_scores(world, estimator)[rows, responses]
        log_weights = in_batch_log_weights(rewards[:, None], logps[:, None])[:, 0]  # the prompt's row of the B
        responses_in_all = world.logps.shape[1] if estimator.reduction == "sum" else 1
        found = logps[:, 0] + rewards[:, 0] - log_weights + math.log(responses_in_all / size)
        return found.reshape(own.shape)

    return log_partition


def grouped(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
    """The prompt's own K answers, the row among them."""
    prompt = torch.arange(len(world))[:, None, None].expand(*own.shape, size)
    responses = torch.cat([own[..., None], world.sample(prompt[..., 1:], generator)], -1)
    rewards = world.rewards[prompt, responses]
    group = torch.arange(own.numel()).repeat_interleave(size)
    log_weights = Grouped()(Table(rewards=rewards.reshape(-1), group=group, length=group), temperature)
    return rewards[..., 0] / temperature - log_weights.reshape(rewards.shape)[..., 0]


def sampled(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
    """K fresh answers of π_ref."""
    prompt = torch.arange(len(world))[:, None, None].expand(*own.shape, size)
    candidates = world.rewards[prompt, world.sample(prompt, generator)].reshape(-1, size)
    rewards, group = world.rewards[prompt[..., 0], own], torch.arange(own.numel())
    rows = Table(rewards=rewards.reshape(-1), group=group, length=group, candidates=candidates)
    log_weights = Sampled(candidates=size, cap=None)(rows, temperature)
    return rewards / temperature - log_weights.reshape(own.shape)


def leave_one_out(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
    """The group's other K − 1 answers."""
    return sampled(world, own, size - 1, temperature, generator)


def balance(world: World, own: Tensor, size: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Σ_j [π_ref(y_j|x_i) / Σ_k π_ref(y_j|x_k)] e^{r_ij/λ}: multiple importance sampling, balance heuristic."""
    x, y = world.micro_batches(own.numel(), size - 1, generator)
    prompt = torch.arange(len(world))[:, None].expand_as(own).reshape(-1, 1)
    prompts, responses = torch.cat([prompt, x], 1), torch.cat([own.reshape(-1, 1), y], 1)
    mixture = world.logps[prompts[:, :, None], responses[:, None, :]].logsumexp(1)
    terms = world.logps[prompt, responses] - mixture + world.rewards[prompt, responses] / temperature
    return terms.logsumexp(-1).reshape(own.shape)


PARTITIONS: Mapping[str, Partition] = {
    "in_batch sum": in_batch(InBatch(reduction="sum")),
    "in_batch mean": in_batch(InBatch(reduction="mean")),
    "in_batch none": in_batch(InBatch(reduction="none")),
    "in_batch sum, own": in_batch(InBatch(reduction="sum", reference="own")),
    "in_batch mean, own": in_batch(InBatch(reduction="mean", reference="own")),
    "balance": balance,
    "grouped": grouped,
    "leave-one-out": leave_one_out,
    "sampled": sampled,
}


def record(world: World, name: str, size: int, temperature: float, *, draws: int = 4000, seed: int = 0) -> Record:
    """Means over prompts, but log_bias_spread, a standard deviation over prompts.

    Of Ẑ: relative_bias E[Ẑ]/Z − 1; variance Var(Ẑ)/Z², which a small Ẑ makes small; relative_variance Var(Ẑ)/E[Ẑ]²,
    which it does not. Of log Ẑ: log_bias E[log Ẑ] − log Z, log_variance. own_correlation: of log Ẑ with the row's own
    r/λ, which pulls the optimum back to π_ref where it is above 0.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.arange(len(world))[:, None].expand(-1, draws)
    own = world.sample(prompt, generator)
    logs = PARTITIONS[name](world, own, size, temperature, generator)
    error = logs - world.log_partition(temperature)[:, None]
    ratio, rewards = error.exp(), world.rewards[prompt, own]
    bias = error.mean(1)
    centred, high = logs - logs.mean(1, keepdim=True), rewards - rewards.mean(1, keepdim=True)
    varies = (centred.abs().amax(1) > 1e-9) & (high.abs().amax(1) > 1e-9)  # else the correlation is of roundings
    spread = (centred.square().sum(1) * high.square().sum(1)).sqrt()
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
        "own_correlation": float(((centred * high).sum(1) / spread)[varies].mean()),
    }


def table(
    *,
    worlds: Iterable[str] = tuple(WORLDS),
    seeds: Iterable[int] = (0, 1, 2),
    sizes: Iterable[int] = (2, 4, 8, 16, 32),
    temperature: float = 1.0,
    draws: int = 4000,
    **options: int,
) -> list[Record]:
    """A record for each world, seed, estimator and B or K. options: draw's, to make it small."""
    return [
        {"world": name, "seed": seed, **record(world, estimator, size, temperature, draws=draws, seed=seed)}
        for name in worlds
        for seed in seeds
        for world in (WORLDS[name](seed, **options),)
        for estimator in PARTITIONS
        for size in sizes
    ]
