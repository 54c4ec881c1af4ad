"""How much reward each objective reaches at which KL from π_ref, compared with π*'s exact frontier.

The policy is a table and the data are always new responses of π_ref, or of the policy itself for online losses. The
learning rate falls to 0, so the policy ends at the objective's own fixed point. `few.py` trains on few rows instead.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from experiments.tabular.argument import find_temperature
from experiments.tabular.methods import METHODS, Method
from experiments.tabular.worlds import Record, draw_world, trace_frontier
from var.testbed.methods import make_policy, sample_rows, train
from var.testbed.world import World


def draw_frontier_world(seed: int = 0) -> World:
    """Return a world of 12 prompts that overlap and 40 responses of up to 3 tokens, with unit reward spreads."""
    return draw_world(seed, prompts=12, tokens=3)


def measure(world: World, logps: Tensor, temperature: float | None) -> Record:
    """Return the numbers of a policy log π [P, Y].

    - reward, kl_policy_reference, length: its means.
    - regret: how much more reward π* has at the same KL from π_ref. No policy has a negative regret.
    - temperature_of_equal_kl, kl_optimum_policy_of_equal_kl: λ of that π*, and KL(π* ‖ π).
    - temperature, kl_optimum_policy, kl_policy_optimum: the method's own λ, and divergences from π* at that λ.
    """
    found = world.summary(logps, 1.0)
    same = find_temperature(world, found["kl_policy_reference"])
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


def run(
    world: World, method: Method, value: Any, *, steps: int, sequences: int, rate: float, seed: int
) -> list[Record]:
    """Train once and return a record of the end, or, for a path, of 1/64, 1/32, … of the steps."""
    loss, generator = method.build(value), torch.Generator().manual_seed(seed)
    policy = make_policy(world, loss)
    temperature = method.temperature(value)
    marks = {steps >> k for k in range(7)} if method.path else {steps}
    out: list[Record] = []

    def watch(step: int, _: float) -> None:
        if step in marks and step:
            head = {"regime": "population", "method": method.name, "knob": method.knob, "value": value, "step": step}
            out.append({**head, "path": method.path, **measure(world, policy.logps(), temperature)})

    rows = sample_rows(
        world, loss, policy, generator, answers=method.answers_at(value), sequences=sequences,
        **method.row_options(world, value),
    )  # fmt: skip
    rate = rate / 5 if method.path else rate  # slow enough to see the path
    train(policy, world, loss, rows, steps=steps, learning_rate=rate, decay=not method.path, watch=watch)
    return out


def make_table(
    *,
    world: World | None = None,
    methods: Iterable[Method] = METHODS,
    steps: int = 500,
    sequences: int = 1024,
    rate: float = 0.05,
    seed: int = 0,
    twice: bool = True,
) -> list[Record]:
    """Return π*'s frontier and a record per objective and value of its knob.

    With `twice`, the middle value of each knob is also trained for twice the steps. If the policy then moved further,
    no fixed point is in reach.
    """
    world = draw_frontier_world() if world is None else world
    limit = trace_frontier(world, torch.logspace(-1.3, 1.3, 27).tolist())
    out: list[Record] = [{"regime": "limit", "method": "π*", **record} for record in limit]
    for method in methods:
        for value in method.values:
            found = run(world, method, value, steps=steps, sequences=sequences, rate=rate, seed=seed)
            if twice and not method.path and value is method.values[len(method.values) // 2]:
                more = run(world, method, value, steps=2 * steps, sequences=sequences, rate=rate, seed=seed)[-1]
                found[-1] |= {f"{key}_of_twice": more[key] for key in ("reward", "kl_policy_reference")}
            out += found
    return out
