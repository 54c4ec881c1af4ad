"""Few rows and shared parameters: where a weight's variance decides, not its bias (docs/method.md).

512 rows (x, y), y ~ π_ref(·|x), train π_θ(y|x) ∝ π_ref(y|x) exp(φ(x, y)·θ) by weighted maximum likelihood from θ = 0,
that is from π_ref, with a ridge; KL(π* ‖ π_θ) is taken on prompts that no row has. φ(x, y) is a response's letters by
position and its length, times 1 and the features of its prompt. Rewards: an offset of the prompt, half of its variance
linear in the features; a part of the family; a part outside it, which is the family's limit; less for another prompt's
answer. λ is in units of the reward's standard deviation within a prompt, which is 1.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from var.testbed import world as worlds
from var.testbed.world import Record, World, expectation, foreign, kl
from var.weights.estimators import Estimator, Global, Grouped, InBatch, Prompt, Sampled, Value, normalize_log_weights
from var.weights.groups import group_logsumexp, group_size
from var.weights.health import health
from var.weights.table import Table

RIDGES = tuple(10.0**e for e in (-3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 1.0))

"""Of the mean log-likelihood, φ being scaled to unit spread under π_ref."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The world; inputs [P, 1 + seen] and outputs [Y, D], whose outer product is φ; which prompts train, which test and
    which stand for infinitely many."""

    world: World
    inputs: Tensor
    outputs: Tensor
    train: Tensor
    test: Tensor
    rest: Tensor


def draw(
    seed: int,
    *,
    rows: int = 512,
    tests: int = 256,
    rest: int = 768,
    mismatch: float = 4.0,
    overlap: float = 0.08,
    offset: float = 2.0,
    outside: float = 0.35,
    letters: int = 6,
    tokens: int = 3,
    features: int = 8,
    seen: int = 1,
) -> Problem:
    """seen: how many of the prompt's features the policy and the family's part of the reward read. outside: standard
    deviation of the part of the reward that no θ expresses; the two parts' variances sum to 1."""
    count = rows + tests + rest
    base = worlds.draw(
        seed, prompts=count, letters=letters, tokens=tokens, features=features, overlap=overlap, spread=1, offset=offset
    )
    generator = torch.Generator().manual_seed(seed + 1_000_003)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def scaled(values: Tensor, deviation: float) -> Tensor:
        """Mean 0 within each prompt under π_ref, and so much spread, pooled."""
        values = values - expectation(base.logps, values)[:, None]
        return deviation * values / expectation(base.logps, values.square()).mean().sqrt()

    outputs = response_features(base)
    inputs = torch.cat([torch.ones(count, 1, dtype=torch.float64), base.features[:, :seen]], 1)
    inside = inputs @ normal(seen + 1, outputs.shape[1]) @ outputs.T
    beyond = normal(*base.rewards.shape)
    quality = scaled(scaled(inside, (1 - outside**2) ** 0.5) + scaled(beyond, outside), 1.0)
    offsets = expectation(base.logps, base.rewards)[:, None]
    world = replace(base, rewards=offsets + quality - mismatch * foreign(base.logps))
    train, test, remaining = torch.arange(count).split([rows, tests, rest])
    return Problem(world=world, inputs=inputs, outputs=outputs, train=train, test=test, rest=remaining)


def response_features(world: World) -> Tensor:
    """[Y, D]: indicators of each letter at each place and of each length, standardised under the mean π_ref."""
    space = world.responses
    letters = torch.nn.functional.one_hot(space.path[1], space.letters + 1)[..., 1:] * space.mask[..., None]
    lengths = torch.nn.functional.one_hot(space.depth, space.tokens + 1)[:, 1:]
    raw = torch.cat([letters.flatten(1), lengths], 1).double()
    share = world.logps.exp().mean(0)
    raw = raw - share @ raw
    return raw / (share @ raw.square()).sqrt().clamp(min=1e-6)


def fit(problem: Problem, prompts: Tensor, mass: Tensor, target: Tensor, ridge: float, start: Tensor) -> Tensor:
    """θ [1 + seen, D] of the largest Σ_i w_i log π_θ(y_i|x_i) − ridge |θ|²/2, by Newton's method with halved steps.

    prompts [n], each once; mass [n] Σ w of its rows; target [n, D] Σ w · outputs[y]. All that the likelihood needs.
    """
    x, z, logps = problem.inputs[prompts], problem.outputs, problem.world.logps[prompts]
    aim = x.T @ target

    def value(theta: Tensor) -> tuple[Tensor, Tensor]:
        scores = logps + x @ theta @ z.T
        total = scores.logsumexp(-1)
        return (aim * theta).sum() - mass @ total - ridge / 2 * theta.square().sum(), (scores - total[:, None]).exp()

    theta = start
    best, p = value(theta)
    for _ in range(50):
        mean = p @ z
        gradient = aim - (x * mass[:, None]).T @ mean - ridge * theta
        seconds = (p @ (z[:, :, None] * z[:, None, :]).flatten(1)).reshape(-1, z.shape[1], z.shape[1])
        covariance = (seconds - mean[:, :, None] * mean[:, None, :]).flatten(1)
        outer = ((x * mass[:, None])[:, :, None] * x[:, None, :]).flatten(1)
        a, d = x.shape[1], z.shape[1]
        hessian = (outer.T @ covariance).reshape(a, a, d, d).permute(0, 2, 1, 3).reshape(a * d, a * d)
        hessian = hessian + ridge * torch.eye(a * d, dtype=torch.float64)
        step = torch.linalg.solve(hessian, gradient.flatten()).reshape(a, d)
        gain = (gradient * step).sum()
        if gain < 1e-12:
            break
        scale = 1.0
        while (tried := value(theta + scale * step))[0] < best + 1e-4 * scale * gain and scale > 1e-6:
            scale /= 2
        theta = theta + scale * step
        best, p = tried
    return theta


def divergence(problem: Problem, theta: Tensor, temperature: float) -> float:
    """KL(π* ‖ π_θ), mean over the test prompts."""
    test = problem.test
    policy = (problem.world.logps[test] + problem.inputs[test] @ theta @ problem.outputs.T).log_softmax(-1)
    return float(kl(problem.world.optimum(temperature)[test], policy).mean())


def limit(problem: Problem, temperature: float) -> float:
    """What the family reaches: θ fitted to π* itself on the prompts that stand for infinitely many."""
    prompts, best = problem.rest, problem.world.optimum(temperature)[problem.rest].exp()
    mass = torch.full((len(prompts),), 1 / len(prompts), dtype=torch.float64)
    start = torch.zeros(problem.inputs.shape[1], problem.outputs.shape[1], dtype=torch.float64)
    theta = fit(problem, prompts, mass, best @ problem.outputs / len(prompts), 1e-6, start)
    return divergence(problem, theta, temperature)


def weighted_fits(
    problem: Problem, prompts: Tensor, responses: Tensor, weights: Tensor, temperature: float, ridges: Iterable[float]
) -> list[float]:
    """KL(π* ‖ π_θ) on new prompts at each ridge, of rows (x, y) [n], [n] weighted by w [n] of mean 1."""
    present, place = prompts.unique(return_inverse=True)
    share = weights / len(weights)
    mass = torch.zeros(len(present), dtype=torch.float64).index_add(0, place, share)
    target = torch.zeros(len(present), problem.outputs.shape[1], dtype=torch.float64)
    target = target.index_add(0, place, share[:, None] * problem.outputs[responses])
    theta = torch.zeros(problem.inputs.shape[1], problem.outputs.shape[1], dtype=torch.float64)
    found = {}
    for ridge in sorted(ridges, reverse=True):  # each start is the last, stiffer fit
        theta = fit(problem, present, mass, target, ridge, theta)
        found[ridge] = divergence(problem, theta, temperature)
    return [found[ridge] for ridge in ridges]


def rows_of(
    problem: Problem, per_prompt: int, size: int, candidates: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Table]:
    """prompts, responses [n] and their table: `per_prompt` answers of π_ref a prompt, micro-batches of `size`, and so
    many candidates a prompt."""
    count = len(problem.train)
    chosen = problem.train[: count // per_prompt].repeat_interleave(per_prompt)
    responses = problem.world.sample(chosen, generator)
    micro = torch.randperm(count, generator=generator).reshape(-1, size)
    asked = problem.train[: count // per_prompt, None].expand(-1, candidates)
    table = problem.world.table(chosen, responses, micro)
    return (
        chosen,
        responses,
        replace(table, candidates=problem.world.rewards[asked, problem.world.sample(asked, generator)]),
    )


Weigher = Callable[[Problem, Tensor, Tensor, Table, float], Tensor]

"""(problem, prompts [n], responses [n], their table, λ) → [n] log-weights."""


def package(estimator: Estimator) -> Weigher:
    return lambda problem, prompts, responses, table, temperature: estimator(table, temperature)


def capped(weigher: Weigher, cap: float = 5.0) -> Weigher:
    """Mean 1, cut at `cap`."""
    return lambda *arguments: normalize_log_weights(weigher(*arguments)).clamp(max=math.log(cap))


def one(problem: Problem, prompts: Tensor, responses: Tensor, table: Table, temperature: float) -> Tensor:
    """SFT."""
    return torch.zeros_like(table.rewards)


def exact(problem: Problem, prompts: Tensor, responses: Tensor, table: Table, temperature: float) -> Tensor:
    """e^{r/λ} / Z(x)."""
    return table.rewards / temperature - problem.world.log_partition(temperature)[prompts]


def leave_one_out(problem: Problem, prompts: Tensor, responses: Tensor, table: Table, temperature: float) -> Tensor:
    """e^{r/λ} over the mean of the prompt's other rows, K ≥ 2."""
    logits = table.rewards / temperature
    total, size = group_logsumexp(logits, table.group), group_size(table.group)
    own = (logits - total).clamp(max=-1e-15)  # alone in a group that it fills to the last bit, it is capped anyway
    return logits - (total + (-own.exp()).log1p()) + (size - 1).log()


def balance(problem: Problem, prompts: Tensor, responses: Tensor, table: Table, temperature: float) -> Tensor:
    """e^{r/λ} over Σ_j [π_ref(y_j|x_i) / Σ_k π_ref(y_j|x_k)] e^{r_ij/λ} of the micro-batch."""
    assert table.micro is not None
    assert table.cross_logps is not None
    assert table.cross_rewards is not None
    mixture = table.cross_logps.logsumexp(1, keepdim=True)
    log_partition = (table.cross_logps - mixture + table.cross_rewards / temperature).logsumexp(-1)
    out = table.rewards / temperature
    out[table.micro] -= log_partition
    return out


SINGLE: Mapping[str, Weigher] = {
    "sft": one,
    "in_batch sum": package(InBatch(reduction="sum")),
    "in_batch mean": package(InBatch(reduction="mean")),
    "in_batch none": package(InBatch(reduction="none")),
    "in_batch sum, own": package(InBatch(reduction="sum", reference="own")),
    "in_batch mean, own": package(InBatch(reduction="mean", reference="own")),
    "balance": balance,
    "global": package(Global()),
    "global, capped": capped(package(Global())),
    "value": package(Value(cap=math.inf)),
    "value, capped": package(Value()),
    "prompt 4": package(Prompt(kappa=4)),
    "prompt 8": package(Prompt(kappa=8)),
    "prompt 4, V = 0": package(Prompt(kappa=4, baseline="zero")),
    "sampled, capped": package(Sampled()),
    "exact": exact,
    "exact, capped": capped(exact),
}


SEVERAL: Mapping[str, Weigher] = {
    **{
        name: SINGLE[name]
        for name in (
            "sft",
            "in_batch mean",
            "global",
            "value, capped",
            "prompt 4",
            "prompt 8",
            "sampled, capped",
            "exact, capped",
        )
    },
    "grouped": package(Grouped()),
    "leave-one-out": leave_one_out,
    "leave-one-out, capped": capped(leave_one_out),
}


WORLDS: Mapping[str, Mapping[str, float]] = {
    "apart": {},
    "fair": {"mismatch": 0.0},
    "shared": {"mismatch": 0.0, "overlap": 0.72},
}

"""Another prompt's answer is 4 lower; it is a fair answer; and it is an answer that the prompt itself would give."""


SETTINGS: tuple[tuple[str, float, int], ...] = (
    ("apart", 1.0, 1),
    ("apart", 1.0, 2),
    ("apart", 1.0, 4),
    ("apart", 0.5, 1),
    ("apart", 0.5, 4),
    ("fair", 1.0, 1),
    ("shared", 1.0, 1),
)

"""World, λ, responses a prompt."""


def table(
    *,
    settings: Iterable[tuple[str, float, int]] = SETTINGS,
    seeds: Iterable[int] = tuple(range(12)),
    methods: Iterable[str] | None = None,
    size: int = 8,
    candidates: int = 8,
    ridges: tuple[float, ...] = RIDGES,
    **options: int,
) -> list[Record]:
    """A record for each setting and method: see `compare`. options: draw's, to make it small."""
    seeds, chosen = tuple(seeds), None if methods is None else tuple(methods)
    drawn: dict[str, list[Problem]] = {}
    records = []
    for world, temperature, per_prompt in settings:
        if world not in drawn:
            drawn[world] = [draw(seed, **{**WORLDS[world], **options}) for seed in seeds]  # type: ignore[arg-type]
        weighers = SINGLE if per_prompt == 1 else SEVERAL
        weighers = {name: weigher for name, weigher in weighers.items() if chosen is None or name in chosen}
        found = compare(drawn[world], seeds, weighers, per_prompt, temperature, size, candidates, ridges)
        records += [{"world": world, **record} for record in found]
    return records


def compare(
    problems: Iterable[Problem],
    seeds: Iterable[int],
    weighers: Mapping[str, Weigher],
    per_prompt: int,
    temperature: float,
    size: int,
    candidates: int,
    ridges: tuple[float, ...],
) -> list[Record]:
    """kl: KL(π* ‖ π_θ) on new prompts, mean over seeds, at the ridge that is best for the method on that mean. gap:
    less the first method's, on the same worlds and rows. limit: the family's. mean_ess: of the weights, over n.
    """
    problems = tuple(problems)
    limits = torch.tensor([limit(problem, temperature) for problem in problems]).double()
    scores = {name: torch.zeros(len(problems), len(ridges)).double() for name in weighers}
    ess = dict.fromkeys(weighers, 0.0)
    for s, (seed, problem) in enumerate(zip(seeds, problems, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        prompts, responses, data = rows_of(problem, per_prompt, size, candidates, generator)
        for name, weigher in weighers.items():
            weights = normalize_log_weights(weigher(problem, prompts, responses, data, temperature)).exp()
            fits = weighted_fits(problem, prompts, responses, weights, temperature, ridges)
            scores[name][s] = torch.tensor(fits).double()
            ess[name] += health(weights, data.length).ess / len(problems)
    best = {name: int(score.mean(0).argmin()) for name, score in scores.items()}
    chosen = {name: scores[name][:, ridge] for name, ridge in best.items()}
    first = next(iter(chosen.values()))
    return [
        {
            "method": name,
            "per_prompt": per_prompt,
            "temperature": temperature,
            "kl": float(values.mean()),
            "kl_error": float(values.std() / len(problems) ** 0.5),
            "gap": float((values - first).mean()),
            "gap_error": float((values - first).std() / len(problems) ** 0.5),
            "mean_ess": ess[name],
            "ridge": ridges[best[name]],
            "limit": float(limits.mean()),
        }
        for name, values in chosen.items()
    ]
