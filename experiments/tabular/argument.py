"""The paper's appendix (arXiv 2502.11026, A.1 and A.2), checked exactly: what clipping does, and the loss's bound.

docs/method.md says in which form both statements hold.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from experiments.tabular.worlds import WORLDS, Record, draw_micro_batches
from var.testbed.world import Responses, World, expectation, kl


def tilt(world: World, gain: Tensor) -> Tensor:
    """Return [P, Y] nats, log of π ∝ π_ref · gain, for gain [P, Y] ≥ 0.

    The loss −gain · log π_θ leads there on data of π_ref. The gain of R-LoL is r if the ratio is held at 1, that of
    A-LoL is A⁺.
    """
    return (world.logps + gain.log()).log_softmax(-1)


def find_clipped_fixed_point(world: World, gain: Tensor, epsilon: float) -> Tensor:
    """Return [P, Y] nats, the fixed point of −gain · clip(ρ, 1 − ε, 1 + ε) · log π_θ.

    ρ = π_θ/π_ref is detached, and 0 < ε < 1. At the fixed point ρ = c · gain · clip(ρ) with one c per prompt. A ratio
    inside the clip range requires c · gain = 1. So the responses separate: ρ is c · gain · (1 + ε) if c · gain ≥ 1, and
    c · gain · (1 − ε) otherwise. c is determined by Σ π_θ = 1. If the sum jumps across 1 at some response, the ratio of
    that response lies inside the clip range and it takes the remaining probability.
    """
    reference = world.logps.exp()

    def ratios(c: Tensor) -> Tensor:
        scaled = c[:, None] * gain
        return scaled * (1 - epsilon + 2 * epsilon * (scaled >= 1).double())

    low = torch.zeros(len(gain), dtype=torch.float64)
    high = (1 / (1 - epsilon)) / expectation(world.logps, gain)  # there the sum is at least 1
    for _ in range(200):
        middle = (low + high) / 2
        enough = (reference * ratios(middle)).sum(-1) >= 1
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    ratio = ratios(low)
    between = (low[:, None] * gain < 1) & (high[:, None] * gain >= 1)
    mass = (reference * between).sum(-1)
    remaining = 1 - (reference * ratio * ~between).sum(-1)
    ratio = torch.where(between, (remaining / mass.clamp(min=1e-300))[:, None], ratio)
    return (world.logps + ratio.log()).log_softmax(-1)


def compute_gains(world: World) -> Mapping[str, Tensor]:
    """Return the gain [P, Y] of R-LoL, the sigmoid of the reward as its authors use it, and of A-LoL, A⁺."""
    advantage = world.rewards - expectation(world.logps, world.rewards)[:, None]
    return {"r_lol": world.rewards.sigmoid(), "a_lol": advantage.clamp(min=0)}


def measure_clips(world: World, *, temperature: float = 1.0, clips: Iterable[float] = (0.9, 0.2)) -> list[Record]:
    """Return where each objective leads, at each ε. clip=0 means that the ratio is held at 1.

    given_up is the fraction of π_ref's responses that get probability 0. best_reward is the largest reward at the same
    KL(π ‖ π_ref), that of π* at another λ.
    """
    policies = {("optimum", 0.0): world.optimum(temperature)}
    for name, gain in compute_gains(world).items():
        policies[name, 0.0] = tilt(world, gain)
        policies.update({(name, clip): find_clipped_fixed_point(world, gain, clip) for clip in clips})
    records = []
    for (name, clip), policy in policies.items():
        numbers = world.summary(policy, temperature)
        best = world.optimum(find_temperature(world, numbers["kl_policy_reference"]))
        given_up = float(expectation(world.logps, (policy == -torch.inf).double()).mean())
        records.append(
            {
                "objective": name, "clip": clip, "temperature": temperature, **numbers,
                "given_up": given_up, "best_reward": world.reward(best),
            }
        )  # fmt: skip
    return records


def find_temperature(world: World, divergence: float) -> float:
    """Return λ between 1e-3 and 1e3 at which KL(π* ‖ π_ref), averaged over prompts, is `divergence`, by bisection."""
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        reached = float(kl(world.optimum(math.exp(middle)), world.logps).mean())
        low, high = (middle, high) if reached > divergence else (low, middle)
    return math.exp((low + high) / 2)


def make_two_answers(rewards: tuple[float, float]) -> World:
    """Return a world of one prompt and two responses of equal probability."""
    return World(
        responses=Responses(1, 1),
        logits=torch.zeros(1, 1, 2, dtype=torch.float64),
        rewards=torch.tensor([rewards], dtype=torch.float64),
        features=torch.zeros(1, 1, dtype=torch.float64),
    )


def compare_close_rewards() -> list[Record]:
    """Return π(y_1|x) / π(y_2|x) of two responses with close rewards, the appendix's example, by objective."""
    world = make_two_answers((1.0, 0.9))
    found = {f"var, λ = {t}": world.optimum(t) for t in (1.0, 0.1)}
    found["r_lol"] = tilt(world, world.rewards)
    found |= {f"r_lol, clip {e}": find_clipped_fixed_point(world, world.rewards, e) for e in (0.9, 0.2)}
    found |= {f"a_lol, V = {v}": tilt(world, (world.rewards - v).clamp(min=0)) for v in (0.8, 0.95)}
    return [{"objective": name, "apart": float((p[0, 0] - p[0, 1]).exp())} for name, p in found.items()]


def bound_loss(weights: Tensor, prompts: Tensor, responses: Tensor, divisor: float = 1.0) -> float:
    """Return the infimum over π_θ of Σ_i w_i · (−log π_θ(y_i|x_i)) / divisor.

    It is Σ_x c(x) H(p(·|x)) / divisor, where the weights of equal (x, y) are added up, c(x) = Σ_y w(x, y) and p = w/c.
    It is attained if and only if π_θ = p wherever c > 0. The entropy is per prompt, so with one response per prompt the
    bound is 0. If an added-up weight is negative, the bound is −inf, because the probability of that response can go
    to 0.

    Args:
        weights: [n].
        prompts: [n] int.
        responses: [n] int.
        divisor: of the loss.
    """
    pairs, place = torch.stack([prompts, responses]).unique(dim=1, return_inverse=True)
    w = torch.zeros(pairs.shape[1], dtype=torch.float64).index_add(0, place, weights.double())
    if bool((w < 0).any()):
        return -math.inf
    group = pairs[0].unique(return_inverse=True)[1]
    c = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, w)
    return float((torch.special.entr(w).sum() - torch.special.entr(c).sum()) / divisor)


def compute_batch_entropy(weights: Tensor, divisor: float = 1.0) -> float:
    """Return Σw · H(w / Σw), the entropy of a batch's weights over all prompts. It is not a bound of the loss."""
    return float((torch.special.entr(weights.double()).sum() - torch.special.entr(weights.double().sum())) / divisor)


def compute_loss(weights: Tensor, prompts: Tensor, responses: Tensor, logps: Tensor, divisor: float = 1.0) -> float:
    """Return Σ_i w_i · (−log π_θ(y_i|x_i)) / divisor of log π_θ [P, Y]. A row of weight 0 adds 0."""
    nll = -logps[prompts, responses]
    return float(torch.where(weights == 0, 0.0, weights * nll).sum() / divisor)


def measure_bounds(world: World, *, temperature: float = 1.0, rows: int = 4096, seed: int = 0) -> list[Record]:
    """Return losses per row with exact weights, for 8 rows and for `rows` rows.

    - bound: the bound of the loss. It tends to optimum_entropy, E_x[H(π*)], as rows grow.
    - least, at_optimum, at_reference: the loss at π_θ = p, at π* and at π_ref.
    - batch_entropy: the entropy of the batch's weights, which is not a bound.
    """
    generator = torch.Generator().manual_seed(seed)
    records = []
    best = world.optimum(temperature)
    entropy = float(expectation(best, -best).mean())
    for n in (8, rows):
        prompts, responses = (t.reshape(-1) for t in draw_micro_batches(world, n, 1, generator))
        logits = world.rewards / temperature - world.log_partition(temperature)[:, None]
        weights = logits[prompts, responses].exp()
        data = torch.zeros_like(world.logps).index_put((prompts, responses), weights, accumulate=True)
        fitted = (data / data.sum(-1, keepdim=True).clamp(min=1e-300)).log()
        records.append(
            {
                "rows": n,
                "bound": bound_loss(weights, prompts, responses, n),
                "least": compute_loss(weights, prompts, responses, fitted, n),
                "at_optimum": compute_loss(weights, prompts, responses, best, n),
                "at_reference": compute_loss(weights, prompts, responses, world.logps, n),
                "optimum_entropy": entropy,
                "batch_entropy": compute_batch_entropy(weights, n),
            }
        )
    return records


def make_table(
    *, worlds: Iterable[str] = tuple(WORLDS), seeds: Iterable[int] = (0, 1, 2), rows: int = 4096, **options: int
) -> list[Record]:
    """Return the records of A.1, then those of A.2, marked by `part`. `options` are arguments of `draw_world`."""
    records = [{"part": "close rewards", **record} for record in compare_close_rewards()]
    for name in worlds:
        for seed in seeds:
            world = WORLDS[name](seed, **options)
            where = {"world": name, "seed": seed}
            records += [{"part": "clip", **where, **record} for record in measure_clips(world)]
            records += [{"part": "bound", **where, **record} for record in measure_bounds(world, rows=rows, seed=seed)]
    return records
