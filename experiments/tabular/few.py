"""The objectives on few rows: shared parameters, the same answers and as many rewards for each, new prompts to judge.

A table of logits cannot tell a good weight from a noisy one (docs/method.md); here variance
decides. A-LoL has the exact V(x) of its rows, which nobody has elsewhere, and `weighted` the exact Z.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from var.requirements import Need
from var.testbed.methods import METHODS, Method, new_policy, rows_of, train
from var.testbed.policies import MICRO_BATCH, Rows, Shared, make_rows
from var.testbed.world import Record, World, draw

ANSWERS = 4  # of π_ref to each prompt that has data


ROLLOUT = 32  # answers of the policy a step, online


MARKS = (4, 8, 16, 32, 64)  # steps after which a policy may be taken


ROLLOUT_MARKS = (4, 8, 16, 64, 256)


def few_world(seed: int = 0) -> World:
    """256 prompts, 40 responses of up to 3 tokens, prompts' rewards apart by sd 2, another prompt's answer up to 4
    lower. Half of the prompts have data, the other half judge."""
    return draw(seed, prompts=256, tokens=3, overlap=0.3, offset=2.0, mismatch=4.0)


def part(world: World, prompts: slice) -> World:
    """Some of the prompts."""
    return World(
        responses=world.responses, logits=world.logits[prompts], rewards=world.rewards[prompts],
        features=world.features[prompts],
    )  # fmt: skip


def few_run(world: World, method: Method, value: Any, *, rate: float, seed: int, marks: Iterable[int]) -> list[Record]:
    """One data set of the second regime: ANSWERS of π_ref to each prompt of the first half, trained on as one batch;
    online, ROLLOUT answers of the policy a step. Judged on the second half after each of the `marks`, at λ = 1."""
    half, generator = len(world) // 2, torch.Generator().manual_seed(seed)
    loss = method.build(value)
    policy = new_policy(Shared, world, loss)
    known, unknown = part(world, slice(half)), part(world, slice(half, None))
    prompts = torch.arange(half)
    given = known.sample(prompts[:, None].expand(-1, ANSWERS), generator)
    each = method.answers_at(value) if method.best else ANSWERS
    prompts, given = prompts.repeat_interleave(ANSWERS // each), given.reshape(-1, each)

    def offline() -> Iterator[Rows]:
        rows = rows_of(known, method, value, prompts, given, generator)
        while True:
            yield rows

    def rollouts() -> Iterator[Rows]:
        while True:
            some = torch.randperm(half, generator=generator)[: ROLLOUT // ANSWERS]
            drawn = known.sample(some[:, None].expand(-1, ANSWERS), generator, policy.logps()[:half])
            yield make_rows(known, loss, some, drawn, generator)

    out: list[Record] = []

    def watch(step: int, _: float) -> None:
        if step in marks:
            found = unknown.summary(policy.logps()[half:], 1.0)
            out.append({"step": step, "evaluations": evaluations(method, loss, half, step), **found})

    rows = rollouts() if method.online else offline()
    train(policy, known, loss, rows, steps=max(marks), rate=rate, decay=False, watch=watch)
    return out


def evaluations(method: Method, loss: Any, prompts: int, steps: int) -> int | None:
    """Rewards that were computed by so many steps; None where all are known."""
    if method.online:
        return ROLLOUT * steps
    if Need.WEIGHT_COLUMN in loss.needs:
        return None
    if Need.CROSS_REWARDS in loss.needs:
        return ANSWERS * prompts * MICRO_BATCH
    more = loss.estimator.candidates if Need.CANDIDATE_REWARDS in loss.needs else 0
    return (ANSWERS + more) * prompts if loss.needs or method.best else 0


def table(
    *,
    methods: Iterable[Method] = METHODS,
    seeds: Iterable[int] = range(8),
    make: Callable[[int], World] = few_world,
) -> list[Record]:
    """Each objective at the knob and number of steps (online: learning rate too) that serve RLHF's objective at λ = 1
    best on new prompts, the mean over seeds; an online one once within the rewards that the others have, and once
    beyond. lost: λ KL(π ‖ π*), what RLHF's objective is below its maximum; gain: what π_ref loses, less that.
    *_error: standard errors over seeds, each a world and data of its own; the gain's is paired.
    """
    worlds = {seed: make(seed) for seed in seeds}
    half = len(next(iter(worlds.values()))) // 2
    judged = [part(world, slice(half, None)) for world in worlds.values()]
    start = [world.summary(world.logps, 1.0) for world in judged]
    out: list[Record] = [{"method": "π_ref", **averaged(start, start)}]
    for method in methods:
        if not method.few:
            continue
        tried: list[Record] = []
        for value in (v for v in method.values if not method.best or v <= ANSWERS):
            rates, marks = ((0.02, 0.1), ROLLOUT_MARKS) if method.online else ((0.02,), MARKS)
            for rate in rates:
                runs = [few_run(w, method, value, rate=rate, seed=seed, marks=marks) for seed, w in worlds.items()]
                head = {"method": method.name, "knob": method.knob, "value": value, "rate": rate}
                tried += [
                    {
                        **head,
                        "step": found[0]["step"],
                        "evaluations": found[0]["evaluations"],
                        **averaged(list(found), start),
                    }
                    for found in zip(*runs, strict=True)
                ]
        within = [record for record in tried if method.online is False or record["evaluations"] <= ANSWERS * half]
        out.append(min(within, key=lambda record: record["lost"]))
        if len(within) < len(tried):
            more = min(tried, key=lambda record: record["lost"])
            out.append({**more, "method": f"{method.name}, more rollouts"})
    return [{"regime": "few", **record} for record in out]


def averaged(runs: list[Record], start: list[Record]) -> Record:
    """Means over seeds of what `summary` says, and standard errors. start: π_ref's."""
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
