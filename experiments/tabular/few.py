"""Every objective on few rows with shared parameters: the same responses and rewards for each, judged on new prompts.

In a table of logits a noisy weight is as good as an exact one (docs/method.md). Here variance decides. A-LoL gets the
exact V(x) of its rows and `weighted` the exact Z, which are not available in practice.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.tabular.methods import METHODS, Method
from experiments.tabular.worlds import Record, draw_world, select_prompts
from var.requirements import WeightColumn, Weights, find
from var.testbed.methods import make_policy, train
from var.testbed.policies import TabularPolicy
from var.testbed.rows import MICRO_BATCH, Rows, make_rows
from var.testbed.world import World

ANSWERS = 4  # responses of π_ref per prompt that has data
ROLLOUT = 32  # responses of the policy per step, online
MARKS = (4, 8, 16, 32, 64)  # steps after which a policy is measured
ROLLOUT_MARKS = (4, 8, 16, 64, 256)  # the same, online


class SharedPolicy(TabularPolicy):
    """π_ref's logits plus a map, linear in 1 and the prompt's features, to a change of all next-token logits.

    Training also changes the policy on prompts without data.
    """

    def __init__(self, world: World, critic: bool = False) -> None:
        super().__init__(world, critic)
        ones = torch.ones(len(world), 1, dtype=torch.float64)
        self.features = torch.cat([ones, world.features / world.features.shape[1] ** 0.5], 1)
        self.reference = world.logits
        self.map = nn.Parameter(torch.zeros(self.features.shape[1], *world.logits.shape[1:], dtype=torch.float64))

    def logits(self) -> Tensor:
        """Return [P, H, V]."""
        return self.reference + torch.einsum("pf,fhv->phv", self.features, self.map)


def draw_few_world(seed: int = 0) -> World:
    """Return a world of 256 prompts, of which half have data and half judge, and 40 responses of up to 3 tokens."""
    return draw_world(seed, prompts=256, tokens=3, overlap=0.3, offset=2.0, mismatch=4.0)


def run(world: World, method: Method, value: Any, *, rate: float, seed: int, marks: Iterable[int]) -> list[Record]:
    """Train on one data set and return the policy's numbers on new prompts at λ = 1, after each of the `marks`.

    The data are ANSWERS responses of π_ref to each prompt of the first half, as one batch. Online losses get ROLLOUT
    responses of the policy per step. The second half of the prompts judges.
    """
    half, generator = len(world) // 2, torch.Generator().manual_seed(seed)
    loss = method.build(value)
    policy = make_policy(world, loss, SharedPolicy)
    known, unknown = select_prompts(world, slice(half)), select_prompts(world, slice(half, None))
    prompts = torch.arange(half)
    answers = known.sample(prompts[:, None].expand(-1, ANSWERS), generator)
    each = method.answers_at(value) if method.best else ANSWERS
    prompts, answers = prompts.repeat_interleave(ANSWERS // each), answers.reshape(-1, each)

    def offline() -> Iterator[Rows]:
        rows = method.rows(known, value, prompts, answers, generator)
        while True:
            yield rows

    def online() -> Iterator[Rows]:
        while True:
            some = torch.randperm(half, generator=generator)[: ROLLOUT // ANSWERS]
            drawn = known.sample(some[:, None].expand(-1, ANSWERS), generator, policy.logps()[:half])
            yield make_rows(known, loss, some, drawn, generator)

    out: list[Record] = []

    def watch(step: int, _: float) -> None:
        if step in marks:
            numbers = unknown.summary(policy.logps()[half:], 1.0)
            out.append({"step": step, "evaluations": count_evaluations(method, loss, half, step), **numbers})

    rows = online() if method.online else offline()
    train(policy, known, loss, rows, steps=max(marks), learning_rate=rate, decay=False, watch=watch)
    return out


def count_evaluations(method: Method, loss: Any, prompts: int, steps: int) -> int | None:
    """Return how many rewards are computed in this many steps, or None if the data has the exact weights."""
    if method.online:
        return ROLLOUT * steps
    if find(loss.requires, WeightColumn):
        return None
    weights = find(loss.requires, Weights)
    if weights and "cross_rewards" in weights.estimator.inputs:
        return ANSWERS * prompts * MICRO_BATCH
    candidates = weights.estimator.candidates if weights and "candidates" in weights.estimator.inputs else 0
    return (ANSWERS + candidates) * prompts if loss.requires or method.best else 0


def make_table(
    *,
    methods: Iterable[Method] = METHODS,
    seeds: Iterable[int] = range(8),
    make_world: Callable[[int], World] = draw_few_world,
) -> list[Record]:
    """Return a record per objective, averaged over seeds, each with its own world and data.

    The knob, the number of steps and, online, the learning rate are those that are best for RLHF's objective at λ = 1
    on new prompts, on average over seeds. An online objective has one record with as many rewards as the others have,
    and a second one, "more rollouts", without that limit.

    - lost: λ KL(π ‖ π*), how far RLHF's objective is below its maximum.
    - gain: `lost` of π_ref less that of the policy. Its standard error is of paired differences.
    """
    worlds = {seed: make_world(seed) for seed in seeds}
    half = len(next(iter(worlds.values()))) // 2
    judged = [select_prompts(world, slice(half, None)) for world in worlds.values()]
    start = [world.summary(world.logps, 1.0) for world in judged]
    out: list[Record] = [{"method": "π_ref", **average(start, start)}]
    for method in methods:
        if not method.few:
            continue
        tried: list[Record] = []
        for value in (v for v in method.values if not method.best or v <= ANSWERS):
            rates, marks = ((0.02, 0.1), ROLLOUT_MARKS) if method.online else ((0.02,), MARKS)
            for rate in rates:
                runs = [run(w, method, value, rate=rate, seed=seed, marks=marks) for seed, w in worlds.items()]
                head = {"method": method.name, "knob": method.knob, "value": value, "rate": rate}
                tried += [
                    {**head, **{key: same[0][key] for key in ("step", "evaluations")}, **average(same, start)}
                    for same in zip(*runs, strict=True)
                ]
        within = [record for record in tried if not method.online or record["evaluations"] <= ANSWERS * half]
        out.append(min(within, key=lambda record: record["lost"]))
        if len(within) < len(tried):
            more = min(tried, key=lambda record: record["lost"])
            out.append({**more, "method": f"{method.name}, more rollouts"})
    return [{"regime": "few", **record} for record in out]


def average(runs: Sequence[Record], start: Sequence[Record]) -> Record:
    """Return means over seeds of the runs' summaries, and standard errors. `start` has the summaries of π_ref."""
    columns = {key: [run[key] for run in runs] for key in ("kl_optimum_policy", "reward", "kl_policy_reference")}
    columns["lost"] = [run["kl_policy_optimum"] for run in runs]
    columns["gain"] = [
        old["kl_policy_optimum"] - run["kl_policy_optimum"] for old, run in zip(start, runs, strict=True)
    ]
    out: Record = {}
    for key, column in columns.items():
        numbers = torch.tensor(column, dtype=torch.float64)
        out[key] = float(numbers.mean())
        out[f"{key}_error"] = float(numbers.std() / len(numbers) ** 0.5) if len(numbers) > 1 else math.nan
    return out
