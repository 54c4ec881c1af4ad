"""Losses along training, on few rows: VAR's is never negative and has a bound from below, its weights being ≥ 0 (the
paper's A.2 as docs/method.md has it); what becomes of the answers that should win under the other objectives.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from experiments.tabular.argument import entropy_bound
from experiments.tabular.few import ANSWERS, few_world, part
from var.testbed.methods import Method, load, new_policy, rows_of, train, var
from var.testbed.policies import Rows, Shared, make_rows
from var.testbed.world import Record, World

STABLE: tuple[Method, ...] = (
    var("var_grouped", "var_grouped", 4),
    Method(name="sft", loss="sft"),
    Method(name="alol", loss="alol"),
    Method(name="alol_seq", loss="alol_seq"),
    Method(name="alol_ref_free", loss="alol_ref_free"),
    Method(name="alol_ref_free, A unclamped", loss="alol_ref_free", options={"draw": "all", "clamp": False}),
    Method(name="alol_kl", loss="alol_kl", options={"draw": "all"}),
    Method(name="dpo", loss="dpo", answers=2),
    Method(name="grpo", loss="grpo", answers=4),
)


def table(*, world: World | None = None, methods: Iterable[Method] = STABLE, **options: Any) -> list[Record]:
    """A record for each method and some of its steps; options: run's."""
    world = few_world() if world is None else world
    return [record for method in methods for record in run(world, method, **options)]


def run(
    world: World, method: Method, *, steps: int = 400, rate: float = 0.02, seed: int = 0, every: int = 5
) -> list[Record]:
    """At a constant rate on the rows of few.py. loss; bound: of VAR's, by its rows; chosen, rejected: log π_θ of the
    better and the worse answer of each pair among those rows, summed over tokens, the same pairs for all methods."""
    half, generator = len(world) // 2, torch.Generator().manual_seed(seed)
    known, prompts = part(world, slice(half)), torch.arange(half)
    given = known.sample(prompts[:, None].expand(-1, ANSWERS), generator)
    pairs = make_rows(known, load("dpo"), prompts, given, generator)
    value = 1.0 if method.knob == "temperature" else None
    loss = method.build(value)
    policy = new_policy(Shared, world, loss)
    rows = rows_of(known, method, value, prompts, given, generator)
    bound = None
    if (weights := rows.columns.get("weights")) is not None:
        divisor = float(known.responses.length[rows.responses].sum())
        bound = entropy_bound(weights, rows.prompts, rows.responses, divisor)
    out: list[Record] = []

    def watch(step: int, value: float) -> None:
        if step % every == 0 and not math.isnan(value):
            logps = policy.logps()[pairs.prompts, pairs.responses]
            found = {"chosen": float(logps[0::2].mean()), "rejected": float(logps[1::2].mean())}
            out.append({"method": method.name, "step": step, "loss": value, "bound": bound, **found})

    def source() -> Iterator[Rows]:
        while True:
            if not method.online:
                yield rows
                continue
            drawn = known.sample(prompts[:, None].expand(-1, ANSWERS), generator, policy.logps()[:half])
            yield make_rows(known, loss, prompts, drawn, generator)

    train(policy, known, loss, source(), steps=steps, rate=rate, decay=False, watch=watch)
    return out
