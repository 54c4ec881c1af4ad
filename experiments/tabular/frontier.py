"""How much reward at which KL from π_ref: every objective beside π*'s exact frontier, which no policy can pass.

The policy is a table, the data fresh answers of π_ref (of the policy itself, for online losses), the learning rate
falls to 0: what is left is the objective's own fixed point. few.py asks the same of few rows.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.tabular.argument import temperature_at
from var.testbed.methods import METHODS, Method, new_policy, rows_of, train
from var.testbed.policies import Rows, Table, TabularPolicy, make_rows
from var.testbed.world import Record, World, draw

POOL = 16  # steps whose rows are drawn at once, and weighed together


def frontier_world(seed: int = 0) -> World:
    """12 prompts that overlap, 40 responses of up to 3 tokens; rewards of unit spread within and between prompts."""
    return draw(seed, prompts=12, tokens=3)


def questions(
    world: World, method: Method, value: Any, count: int, generator: torch.Generator, logps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """prompts [count], drawn uniformly, and K answers of π_ref, or of the policy `logps`, to each."""
    prompts = torch.randint(len(world), (count,), generator=generator)
    asked = prompts[:, None].expand(-1, method.answers_at(value))
    return prompts, world.sample(asked, generator, logps)


def stream(
    world: World, method: Method, value: Any, policy: TabularPolicy, sequences: int, generator: torch.Generator
) -> Iterator[Rows]:
    """The rows of each optimiser step, `sequences` of them, never the same twice."""
    loss, rewards = method.build(value), method.rewards(world)
    count = sequences if method.best else max(1, sequences // method.answers_at(value))
    while True:
        if method.online:
            asked = questions(world, method, value, count, generator, policy.logps())
            yield make_rows(world, loss, *asked, generator, rewards=rewards)
            continue
        asked = questions(world, method, value, POOL * count, generator)
        rows = rows_of(world, method, value, *asked, generator)
        whole = len(rows) - len(rows) % sequences
        for index in torch.arange(whole).split(sequences):
            yield rows.take(index)


def numbers(world: World, logps: Tensor, temperature: float | None) -> Record:
    """Where a policy lies: reward, KL from π_ref, mean length; regret, what π* has more at the same KL, the λ of that
    π* and the divergences from it; and those from π* at the method's own λ, where it has one."""
    found = world.summary(logps, 1.0)
    same = temperature_at(world, found["kl_policy_reference"])
    best = world.reward(world.optimum(same))
    at_same = world.summary(logps, same)
    own = {} if temperature is None else world.summary(logps, temperature)
    return {
        "reward": found["reward"],
        "kl_policy_reference": found["kl_policy_reference"],
        "length": found["length"],
        "regret": best - found["reward"],
        "temperature_of_equal_kl": same,
        "kl_optimum_policy_of_equal_kl": at_same["kl_optimum_policy"],
        "temperature": temperature,
        "kl_optimum_policy": own.get("kl_optimum_policy"),
        "kl_policy_optimum": own.get("kl_policy_optimum"),
    }


def records(
    world: World, method: Method, value: Any, *, steps: int, sequences: int, rate: float, seed: int
) -> list[Record]:
    """One run of the first regime: its end, or, along a path, where it is after 1/64, 1/32, … of the steps."""
    loss, generator = method.build(value), torch.Generator().manual_seed(seed)
    policy = new_policy(Table, world, loss)
    temperature = method.temperature(value)
    marks = {steps >> k for k in range(7)} if method.path else {steps}
    out: list[Record] = []

    def watch(step: int, _: float) -> None:
        if step in marks and step:
            head = {"regime": "population", "method": method.name, "knob": method.knob, "value": value, "step": step}
            out.append({**head, "path": method.path, **numbers(world, policy.logps(), temperature)})

    rows = stream(world, method, value, policy, sequences, generator)
    speed = rate / 5 if method.path else rate  # slow enough to see where it goes
    train(policy, world, loss, rows, steps=steps, rate=speed, decay=not method.path, watch=watch)
    return out


def table(
    *,
    world: World | None = None,
    methods: Iterable[Method] = METHODS,
    steps: int = 500,
    sequences: int = 1024,
    rate: float = 0.05,
    seed: int = 0,
    twice: bool = True,
) -> list[Record]:
    """First regime, and π*'s frontier as its limit. twice: at the middle value of each knob, where twice the steps
    lead, for what still moves has no fixed point in reach."""
    world = frontier_world() if world is None else world
    limit = world.frontier(torch.logspace(-1.3, 1.3, 27).tolist())
    out: list[Record] = [{"regime": "limit", "method": "π*", **record} for record in limit]
    for method in methods:
        for value in method.values:
            run = records(world, method, value, steps=steps, sequences=sequences, rate=rate, seed=seed)
            if twice and not method.path and value is method.values[len(method.values) // 2]:
                more = records(world, method, value, steps=2 * steps, sequences=sequences, rate=rate, seed=seed)[-1]
                run[-1] |= {f"{key}_of_twice": more[key] for key in ("reward", "kl_policy_reference")}
            out += run
    return out
