"""The paper's appendix (arXiv 2502.11026, A.1 and A.2) where it can be checked: what clipping does, and what bounds
the loss. docs/method.md says how both hold.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from var.testbed.world import WORLDS, Record, Responses, World, expectation, kl


def tilted(world: World, gain: Tensor) -> Tensor:
    """[P, Y] nats: ∝ π_ref · gain, gain [P, Y] ≥ 0: where −gain · log π_θ leads over π_ref's data. R-LoL with the ratio
    held at 1 has gain r, A-LoL A⁺."""
    return (world.logps + gain.log()).log_softmax(-1)


def clipped(world: World, gain: Tensor, epsilon: float) -> Tensor:
    """[P, Y] nats: the fixed point of −gain · clip(ρ, 1 − ε, 1 + ε) · log π_θ, ρ = π_θ/π_ref, detached, 0 < ε < 1.

    There ρ = c · gain · clip(ρ) for one c a prompt. Inside the clip that asks c · gain = 1, so answers part: above it
    they are at c · gain · (1 + ε), below it at c · gain · (1 − ε), and c is what makes π_θ sum to 1. Where the sum
    jumps over 1, the answer that it jumps at lies inside the clip and takes the rest.
    """
    reference = world.logps.exp()

    def ratios(c: Tensor) -> Tensor:
        scaled = c[:, None] * gain
        return scaled * (1 - epsilon + 2 * epsilon * (scaled >= 1).double())

    low = torch.zeros(len(gain), dtype=torch.float64)
    high = (1 / (1 - epsilon)) / expectation(world.logps, gain)  # the sum is 1 there or more
    for _ in range(200):
        middle = (low + high) / 2
        enough = (reference * ratios(middle)).sum(-1) >= 1
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    found = ratios(low)
    between = (low[:, None] * gain < 1) & (high[:, None] * gain >= 1)
    mass = (reference * between).sum(-1)
    rest = 1 - (reference * found * ~between).sum(-1)
    found = torch.where(between, (rest / mass.clamp(min=1e-300))[:, None], found)
    return (world.logps + found.log()).log_softmax(-1)


def gains(world: World) -> Mapping[str, Tensor]:
    """r_lol: the reward through a sigmoid, as the authors have it, so positive. a_lol: A⁺ = (r − E_{π_ref}[r])⁺."""
    advantage = world.rewards - expectation(world.logps, world.rewards)[:, None]
    return {"r_lol": world.rewards.sigmoid(), "a_lol": advantage.clamp(min=0)}


def clip_records(world: World, *, temperature: float = 1.0, clips: Iterable[float] = (0.9, 0.2)) -> list[Record]:
    """Where each objective leads: KL(π ‖ π_ref), E[r], the share of π_ref's answers that are given up, and the largest
    E[r] at that KL, π*'s at another λ. clip 0: the ratio held at 1."""
    policies = {("optimum", 0.0): world.optimum(temperature)}
    for name, gain in gains(world).items():
        policies[name, 0.0] = tilted(world, gain)
        policies.update({(name, clip): clipped(world, gain, clip) for clip in clips})
    records = []
    for (name, clip), policy in policies.items():
        numbers = world.summary(policy, temperature)
        best = world.optimum(temperature_at(world, numbers["kl_policy_reference"]))
        given_up = float(expectation(world.logps, (policy == -torch.inf).double()).mean())
        records.append(
            {
                "objective": name, "clip": clip, "temperature": temperature, **numbers,
                "given_up": given_up, "best_reward": world.reward(best),
            }
        )  # fmt: skip
    return records


def temperature_at(world: World, divergence: float) -> float:
    """λ at which KL(π* ‖ π_ref), mean over prompts, is `divergence`; by bisection, between 1e-3 and 1e3."""
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        reached = float(kl(world.optimum(math.exp(middle)), world.logps).mean())
        low, high = (middle, high) if reached > divergence else (low, middle)
    return math.exp((low + high) / 2)


def two_answers(rewards: tuple[float, float]) -> World:
    """One prompt, two answers that π_ref gives equally often."""
    return World(
        responses=Responses(1, 1),
        logits=torch.zeros(1, 1, 2, dtype=torch.float64),
        rewards=torch.tensor([rewards], dtype=torch.float64),
        features=torch.zeros(1, 1, dtype=torch.float64),
    )


def close_rewards() -> list[Record]:
    """The appendix's example: how far apart two answers of close rewards end up, π(y_1|x) / π(y_2|x)."""
    world = two_answers((1.0, 0.9))
    found = {f"var, λ = {t}": world.optimum(t) for t in (1.0, 0.1)}
    found["r_lol"] = tilted(world, world.rewards)
    found |= {f"r_lol, clip {e}": clipped(world, world.rewards, e) for e in (0.9, 0.2)}
    found |= {f"a_lol, V = {v}": tilted(world, (world.rewards - v).clamp(min=0)) for v in (0.8, 0.95)}
    return [{"objective": name, "apart": float((p[0, 0] - p[0, 1]).exp())} for name, p in found.items()]


def entropy_bound(weights: Tensor, prompts: Tensor, responses: Tensor, divisor: float = 1.0) -> float:
    """inf over π_θ of Σ_i w_i · (−log π_θ(y_i|x_i)) / divisor: Σ_x c(x) H(p(·|x)), with the weights of equal (x, y)
    added up, c(x) = Σ_y w(x, y) and p = w/c. Met where π_θ = p wherever c > 0, and there alone.

    weights [n]; prompts, responses [n] int. −inf where an added-up weight is negative: that answer's probability goes
    to 0 and the loss to −∞. The entropy is per prompt: with one response a prompt the bound is 0.
    """
    pairs, place = torch.stack([prompts, responses]).unique(dim=1, return_inverse=True)
    w = torch.zeros(pairs.shape[1], dtype=torch.float64).index_add(0, place, weights.double())
    if bool((w < 0).any()):
        return -math.inf
    group = pairs[0].unique(return_inverse=True)[1]
    c = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, w)
    return float((torch.special.entr(w).sum() - torch.special.entr(c).sum()) / divisor)


def batch_entropy(weights: Tensor, divisor: float = 1.0) -> float:
    """Σw · H(w / Σw): the entropy of a batch's weights, over prompts too. No bound."""
    return float((torch.special.entr(weights.double()).sum() - torch.special.entr(weights.double().sum())) / divisor)


def weighted_nll(weights: Tensor, prompts: Tensor, responses: Tensor, logps: Tensor, divisor: float = 1.0) -> float:
    """Σ_i w_i · (−log π_θ(y_i|x_i)) / divisor, of log π_θ [P, Y]; a row of weight 0 costs nothing."""
    nll = -logps[prompts, responses]
    return float(torch.where(weights == 0, 0.0, weights * nll).sum() / divisor)


def bound_records(world: World, *, temperature: float = 1.0, rows: int = 4096, seed: int = 0) -> list[Record]:
    """Per row, with exact weights: the bound; the least loss, at π_θ = p; the loss at π* and at π_ref; E_x[H(π*)], to
    which the bound comes up as rows grow; and the entropy of the batch's weights, which is no bound."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    best = world.optimum(temperature)
    entropy = float(expectation(best, -best).mean())
    for n in (8, rows):
        prompts, responses = (t.reshape(-1) for t in world.micro_batches(n, 1, generator))
        logits = world.rewards / temperature - world.log_partition(temperature)[:, None]
        weights = logits[prompts, responses].exp()
        data = torch.zeros_like(world.logps).index_put((prompts, responses), weights, accumulate=True)
        fitted = (data / data.sum(-1, keepdim=True).clamp(min=1e-300)).log()
        records.append(
            {
                "rows": n,
                "bound": entropy_bound(weights, prompts, responses, n),
                "least": weighted_nll(weights, prompts, responses, fitted, n),
                "at_optimum": weighted_nll(weights, prompts, responses, best, n),
                "at_reference": weighted_nll(weights, prompts, responses, world.logps, n),
                "optimum_entropy": entropy,
                "batch_entropy": batch_entropy(weights, n),
            }
        )
    return records


def table(
    *, worlds: Iterable[str] = tuple(WORLDS), seeds: Iterable[int] = (0, 1, 2), rows: int = 4096, **options: int
) -> list[Record]:
    """A.1, then A.2, `part` says which. options: draw's, to make it small."""
    records = [{"part": "close rewards", **record} for record in close_rewards()]
    for name in worlds:
        for seed in seeds:
            world = WORLDS[name](seed, **options)
            where = {"world": name, "seed": seed}
            records += [{"part": "clip", **where, **record} for record in clip_records(world)]
            records += [{"part": "bound", **where, **record} for record in bound_records(world, rows=rows, seed=seed)]
    return records
