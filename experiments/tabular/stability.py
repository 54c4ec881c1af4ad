"""Losses along training on few rows, and the log-probability of the better and the worse responses.

VAR's weights are not negative, so its loss is not negative and has a lower bound (the paper's A.2, in the form of
docs/method.md).
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from experiments.tabular.argument import bound_loss
from experiments.tabular.few import ANSWERS, SharedPolicy, draw_few_world
from experiments.tabular.methods import Method, var_method
from experiments.tabular.worlds import Record, select_prompts
from var.testbed.methods import load_loss, make_policy, train
from var.testbed.rows import Rows, make_rows
from var.testbed.world import World

STABLE: tuple[Method, ...] = (
    var_method("var_grouped", "var_grouped", 4),
    Method(name="sft", loss="sft"),
    Method(name="alol", loss="alol"),
    Method(name="alol_seq", loss="alol_seq"),
    Method(name="alol_ref_free", loss="alol_ref_free"),
    Method(name="alol_ref_free, A unclamped", loss="alol_ref_free", options={"draw": "all", "clamp": False}),
    Method(name="alol_kl", loss="alol_kl", options={"draw": "all"}),
    Method(name="dpo", loss="dpo", answers=2),
    Method(name="grpo", loss="grpo", answers=4),
)


def make_table(*, world: World | None = None, methods: Iterable[Method] = STABLE, **options: Any) -> list[Record]:
    """Return the records of each method. `options` are arguments of `run`."""
    world = draw_few_world() if world is None else world
    return [record for method in methods for record in run(world, method, **options)]


def run(
    world: World, method: Method, *, steps: int = 400, rate: float = 0.02, seed: int = 0, every: int = 5
) -> list[Record]:
    """Train at a constant rate on the rows of `few.py` and return a record every `every` steps.

    - loss: the loss of the step.
    - bound: the lower bound of a weighted loss on its rows.
    - chosen, rejected: log π_θ, summed over tokens, of the better and the worse response of each pair among those
      rows. All methods have the same pairs.
    """
    half, generator = len(world) // 2, torch.Generator().manual_seed(seed)
    known, prompts = select_prompts(world, slice(half)), torch.arange(half)
    answers = known.sample(prompts[:, None].expand(-1, ANSWERS), generator)
    pairs = make_rows(known, load_loss("dpo"), prompts, answers, generator)
    value = 1.0 if method.knob == "temperature" else None
    loss = method.build(value)
    policy, online = make_policy(world, loss, SharedPolicy), method.online
    rows = method.rows(known, value, prompts, answers, generator)
    bound = None
    if (weights := rows.columns.get("weights")) is not None:
        divisor = float(known.responses.length[rows.responses].sum())
        bound = bound_loss(weights, rows.prompts, rows.responses, divisor)
    out: list[Record] = []

    def watch(step: int, value: float) -> None:
        if step % every == 0 and not math.isnan(value):
            logps = policy.logps()[pairs.prompts, pairs.responses]
            pair_logps = {"chosen": float(logps[0::2].mean()), "rejected": float(logps[1::2].mean())}
            out.append({"method": method.name, "step": step, "loss": value, "bound": bound, **pair_logps})

    def source() -> Iterator[Rows]:
        while True:
            if not online:
                yield rows
                continue
            drawn = known.sample(prompts[:, None].expand(-1, ANSWERS), generator, policy.logps()[:half])
            yield make_rows(known, loss, prompts, drawn, generator)

    train(policy, known, loss, source(), steps=steps, learning_rate=rate, decay=False, watch=watch)
    return out
