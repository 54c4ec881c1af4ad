"""VAR's weights on few rows with shared parameters, where their variance decides, not their bias (docs/method.md).

512 rows (x, y) with y ~ π_ref(·|x) train π_θ(y|x) ∝ π_ref(y|x) exp(φ(x, y)·θ) by weighted maximum likelihood with a
ridge penalty, from θ = 0, that is from π_ref. KL(π* ‖ π_θ) is measured on prompts without rows. φ(x, y) is the outer
product of a response's letters by position and its length with 1 and the features of its prompt.

A reward is the sum of an offset per prompt, half of whose variance is linear in the features, of a part that the family
of policies can express, and of a part that it cannot, less a penalty for another prompt's response. λ is in units of
the reward's standard deviation within a prompt, which is 1.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.tabular.worlds import Record, draw_world, foreignness
from var.testbed.world import World, expectation, kl
from var.weights.estimators import Estimator, Global, Grouped, InBatch, Prompt, Sampled, Value, normalize_log_weights
from var.weights.groups import group_logsumexp, group_size
from var.weights.health import weight_health
from var.weights.inputs import WeightInputs

# penalties on the mean log-likelihood, for φ of unit standard deviation under π_ref
RIDGES = tuple(10.0**e for e in (-3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A world with the features of a log-linear policy, and the split of its prompts."""

    world: World
    """All prompts."""
    inputs: Tensor
    """[P, 1 + seen], 1 and the features of a prompt. Their outer product with `outputs` is φ."""
    outputs: Tensor
    """[Y, D], the features of a response."""
    train: Tensor
    """Prompts that have rows."""
    test: Tensor
    """Prompts on which the policy is measured."""
    rest: Tensor
    """Prompts that serve as infinitely many, to compute the limit of the family."""


def draw_problem(
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
    """Return the problem of a seed.

    `rows`, `tests` and `rest` are numbers of prompts. The policy and the family's part of the reward read `seen`
    features of a prompt. `outside` is the standard deviation of the part of the reward that no θ expresses. The
    variances of the two parts sum to 1. The other arguments are those of `draw_world`.
    """
    count = rows + tests + rest
    base = draw_world(
        seed, prompts=count, letters=letters, tokens=tokens, features=features, overlap=overlap, spread=1, offset=offset
    )
    generator = torch.Generator().manual_seed(seed + 1_000_003)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def scaled(values: Tensor, deviation: float) -> Tensor:
        """Return values with mean 0 within each prompt under π_ref and this standard deviation, pooled."""
        values = values - expectation(base.logps, values)[:, None]
        return deviation * values / expectation(base.logps, values.square()).mean().sqrt()

    outputs = encode_responses(base)
    inputs = torch.cat([torch.ones(count, 1, dtype=torch.float64), base.features[:, :seen]], 1)
    inside = inputs @ normal(seen + 1, outputs.shape[1]) @ outputs.T
    beyond = normal(*base.rewards.shape)
    quality = scaled(scaled(inside, (1 - outside**2) ** 0.5) + scaled(beyond, outside), 1.0)
    offsets = expectation(base.logps, base.rewards)[:, None]
    world = replace(base, rewards=offsets + quality - mismatch * foreignness(base.logps))
    train, test, remaining = torch.arange(count).split([rows, tests, rest])
    return Problem(world=world, inputs=inputs, outputs=outputs, train=train, test=test, rest=remaining)


def encode_responses(world: World) -> Tensor:
    """Return [Y, D], indicators of each letter at each position and of each length, standardized under mean π_ref."""
    space = world.responses
    letters = torch.nn.functional.one_hot(space.path[1], space.letters + 1)[..., 1:] * space.mask[..., None]
    lengths = torch.nn.functional.one_hot(space.depth, space.tokens + 1)[:, 1:]
    raw = torch.cat([letters.flatten(1), lengths], 1).double()
    share = world.logps.exp().mean(0)
    raw = raw - share @ raw
    return raw / (share @ raw.square()).sqrt().clamp(min=1e-6)


def fit(problem: Problem, prompts: Tensor, mass: Tensor, target: Tensor, ridge: float, start: Tensor) -> Tensor:
    """Return θ [1 + seen, D] that maximizes Σ_i w_i log π_θ(y_i|x_i) − ridge |θ|²/2.

    It is found by Newton's method with backtracking from θ = `start`. `prompts` [n] has each prompt with rows once.
    `mass` [n] is Σ w and `target` [n, D] is Σ w · outputs[y], over the rows of a prompt.
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


def measure_divergence(problem: Problem, theta: Tensor, temperature: float) -> float:
    """Return KL(π* ‖ π_θ), averaged over the test prompts."""
    test = problem.test
    policy = (problem.world.logps[test] + problem.inputs[test] @ theta @ problem.outputs.T).log_softmax(-1)
    return float(kl(problem.world.optimum(temperature)[test], policy).mean())


def find_limit(problem: Problem, temperature: float) -> float:
    """Return KL(π* ‖ π_θ) of θ fitted to π* itself on many prompts, the best that the family reaches."""
    prompts, best = problem.rest, problem.world.optimum(temperature)[problem.rest].exp()
    mass = torch.full((len(prompts),), 1 / len(prompts), dtype=torch.float64)
    start = torch.zeros(problem.inputs.shape[1], problem.outputs.shape[1], dtype=torch.float64)
    theta = fit(problem, prompts, mass, best @ problem.outputs / len(prompts), 1e-6, start)
    return measure_divergence(problem, theta, temperature)


def fit_ridges(
    problem: Problem, prompts: Tensor, responses: Tensor, weights: Tensor, temperature: float, ridges: Iterable[float]
) -> Tensor:
    """Return KL(π* ‖ π_θ) on the test prompts at each ridge, fitted to n rows with weights [n] of mean 1."""
    present, place = prompts.unique(return_inverse=True)
    share = weights / len(weights)
    mass = torch.zeros(len(present), dtype=torch.float64).index_add(0, place, share)
    target = torch.zeros(len(present), problem.outputs.shape[1], dtype=torch.float64)
    target = target.index_add(0, place, share[:, None] * problem.outputs[responses])
    theta = torch.zeros(problem.inputs.shape[1], problem.outputs.shape[1], dtype=torch.float64)
    found = {}
    for ridge in sorted(ridges, reverse=True):  # each fit starts at the one before, of the larger ridge
        theta = fit(problem, present, mass, target, ridge, theta)
        found[ridge] = measure_divergence(problem, theta, temperature)
    return torch.tensor([found[ridge] for ridge in ridges]).double()


def draw_rows(
    problem: Problem, per_prompt: int, size: int, candidates: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, WeightInputs]:
    """Return prompts [n], responses [n] and the estimators' inputs.

    A prompt has `per_prompt` responses, and `candidates` others for a sampled Z. A micro-batch has `size` rows.
    """
    count = len(problem.train)
    chosen = problem.train[: count // per_prompt].repeat_interleave(per_prompt)
    responses = problem.world.sample(chosen, generator)
    micro = torch.randperm(count, generator=generator).reshape(-1, size)
    asked = problem.train[: count // per_prompt, None].expand(-1, candidates)
    inputs = problem.world.weight_inputs(chosen, responses, micro)
    sampled = problem.world.rewards[asked, problem.world.sample(asked, generator)]
    return chosen, responses, replace(inputs, candidates=sampled)


Weigher = Callable[[Problem, Tensor, Tensor, WeightInputs, float], Tensor]
"""From a problem, prompts [n], responses [n], the estimators' inputs and λ to [n] log-weights."""


def wrap(estimator: Estimator) -> Weigher:
    """Return an estimator of the package as a Weigher."""
    return lambda problem, prompts, responses, inputs, temperature: estimator(inputs, temperature)


def cap_weights(weigher: Weigher, cap: float = 5.0) -> Weigher:
    """Return a Weigher that divides weights by their mean and clips them at `cap`."""
    return lambda *arguments: normalize_log_weights(weigher(*arguments)).clamp(max=math.log(cap))


def weigh_equally(
    problem: Problem, prompts: Tensor, responses: Tensor, inputs: WeightInputs, temperature: float
) -> Tensor:
    """Return the weight 1 of SFT."""
    return torch.zeros_like(inputs.rewards)


def weigh_exactly(
    problem: Problem, prompts: Tensor, responses: Tensor, inputs: WeightInputs, temperature: float
) -> Tensor:
    """Return e^{r/λ} / Z(x) with the exact Z."""
    return inputs.rewards / temperature - problem.world.log_partition(temperature)[prompts]


def weigh_leave_one_out(
    problem: Problem, prompts: Tensor, responses: Tensor, inputs: WeightInputs, temperature: float
) -> Tensor:
    """Return e^{r/λ} over its mean on the prompt's other rows, K ≥ 2."""
    logits = inputs.rewards / temperature
    total, size = group_logsumexp(logits, inputs.group), group_size(inputs.group)
    own = (logits - total).clamp(max=-1e-15)  # so that the others' part is above 0 after rounding
    return logits - (total + (-own.exp()).log1p()) + (size - 1).log()


def weigh_balance(
    problem: Problem, prompts: Tensor, responses: Tensor, inputs: WeightInputs, temperature: float
) -> Tensor:
    """Return e^{r/λ} over Σ_j [π_ref(y_j|x_i) / Σ_k π_ref(y_j|x_k)] e^{r_ij/λ} of the micro-batch."""
    assert inputs.micro is not None
    assert inputs.cross_logps is not None
    assert inputs.cross_rewards is not None
    mixture = inputs.cross_logps.logsumexp(1, keepdim=True)
    log_partition = (inputs.cross_logps - mixture + inputs.cross_rewards / temperature).logsumexp(-1)
    out = inputs.rewards / temperature
    out[inputs.micro] -= log_partition
    return out


SINGLE: Mapping[str, Weigher] = {  # for one response per prompt
    "sft": weigh_equally,
    "in_batch sum": wrap(InBatch(reduction="sum")),
    "in_batch mean": wrap(InBatch(reduction="mean")),
    "in_batch none": wrap(InBatch(reduction="none")),
    "in_batch sum, own": wrap(InBatch(reduction="sum", reference="own")),
    "in_batch mean, own": wrap(InBatch(reduction="mean", reference="own")),
    "in_batch mean, not in the numerator": wrap(InBatch(reduction="mean", reference_in_numerator=False)),
    "in_batch sum, not in the numerator": wrap(InBatch(reduction="sum", reference_in_numerator=False)),
    "balance": weigh_balance,
    "global": wrap(Global()),
    "global, capped": cap_weights(wrap(Global())),
    "value": wrap(Value(cap=math.inf)),
    "value, capped": wrap(Value()),
    "prompt 4": wrap(Prompt(kappa=4)),
    "prompt 8": wrap(Prompt(kappa=8)),
    "prompt 4, V = 0": wrap(Prompt(kappa=4, baseline="zero")),
    "sampled, capped": wrap(Sampled()),
    "exact": weigh_exactly,
    "exact, capped": cap_weights(weigh_exactly),
}


SEVERAL: Mapping[str, Weigher] = {  # for more than one
    **{name: SINGLE[name] for name in ("sft", "in_batch mean", "global", "value, capped")},
    **{name: SINGLE[name] for name in ("prompt 4", "prompt 8", "sampled, capped", "exact, capped")},
    "grouped": wrap(Grouped(drop_zero_variance=False)),
    "leave-one-out": weigh_leave_one_out,
    "leave-one-out, capped": cap_weights(weigh_leave_one_out),
}


WORLDS: Mapping[str, Mapping[str, float]] = {
    "apart": {},  # another prompt's response scores up to 4 lower
    "fair": {"mismatch": 0.0},  # it scores like an own response
    "shared": {"mismatch": 0.0, "overlap": 0.72},  # and it is likely under the prompt itself
}

SETTINGS: tuple[tuple[str, float, int], ...] = (  # world, λ, responses per prompt
    ("apart", 1.0, 1),
    ("apart", 1.0, 2),
    ("apart", 1.0, 4),
    ("apart", 0.5, 1),
    ("apart", 0.5, 4),
    ("fair", 1.0, 1),
    ("shared", 1.0, 1),
)


def make_table(
    *,
    settings: Iterable[tuple[str, float, int]] = SETTINGS,
    seeds: Iterable[int] = tuple(range(12)),
    methods: Iterable[str] | None = None,
    size: int = 8,
    candidates: int = 8,
    ridges: tuple[float, ...] = RIDGES,
    **options: int,
) -> list[Record]:
    """Return a record per setting and method, see `compare`. `options` are arguments of `draw_problem`."""
    seeds, chosen = tuple(seeds), tuple(methods or (*SINGLE, *SEVERAL))
    drawn: dict[str, list[Problem]] = {}
    records = []
    for world, temperature, per_prompt in settings:
        if world not in drawn:
            drawn[world] = [draw_problem(seed, **{**WORLDS[world], **options}) for seed in seeds]  # type: ignore[arg-type]
        listed = SINGLE if per_prompt == 1 else SEVERAL
        weighers = {name: weigher for name, weigher in listed.items() if name in chosen}
        found = compare(drawn[world], seeds, weighers, per_prompt, temperature, size, candidates, ridges)
        records += [{"world": world, **record} for record in found]
    return records


def compare(
    problems: Sequence[Problem],
    seeds: Iterable[int],
    weighers: Mapping[str, Weigher],
    per_prompt: int,
    temperature: float,
    size: int,
    candidates: int,
    ridges: tuple[float, ...],
) -> list[Record]:
    """Return a record per method, averaged over the seeds' problems.

    - kl: KL(π* ‖ π_θ) on new prompts, at the ridge that is best for the method on average.
    - gap: kl less that of the first method, on the same worlds and rows.
    - limit: the smallest kl in the family of policies.
    - mean_ess: the effective sample size of the weights, divided by n.
    """
    limits = torch.tensor([find_limit(problem, temperature) for problem in problems]).double()
    scores = {name: torch.zeros(len(problems), len(ridges)).double() for name in weighers}
    ess = dict.fromkeys(weighers, 0.0)
    for s, (seed, problem) in enumerate(zip(seeds, problems, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        prompts, responses, data = draw_rows(problem, per_prompt, size, candidates, generator)
        for name, weigher in weighers.items():
            weights = normalize_log_weights(weigher(problem, prompts, responses, data, temperature)).exp()
            scores[name][s] = fit_ridges(problem, prompts, responses, weights, temperature, ridges)
            ess[name] += weight_health(weights, data.length).ess / len(problems)
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
