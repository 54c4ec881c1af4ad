"""Reward against time: how much reward each method has after some seconds of sampling, scoring and training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.items.base import Column, Command, Item, Row, Table
from experiments.items.methods import make_rows, tune
from experiments.items.paths import PANEL, Pool, along, pool, read_seconds, read_times
from experiments.items.reward_kl import EXPERIMENT, SEEDS, STEPS

METHODS = (
    "SFT on the best of 4", "SFT on right answers", "VAR, prompt", "VAR, grouped", "VAR, grouped, roulette", "DPO",
    "GRPO", "VAR, online",
)  # fmt: skip
SECONDS = (60, 120, 180, 240)
CLOCK = "seconds"
"""The command that measures the seconds of a row's steps."""


def measure(row: Row) -> Row:
    """Return a row with a command that repeats its runs without evaluations."""
    words = (EXPERIMENT, *tune(row.label), "eval=off", "seed={seed}", "runs={own}/runs")
    return replace(row, stages={**row.stages, CLOCK: Command(("train.py",), words, "runs/*/summary.json")})


def at(index: int, seconds: int) -> tuple[Column, Column]:
    """Return the columns of the KL and the reward after some seconds. A path that has ended by then has none."""
    kl, reward = (
        replace(column, second_stage=CLOCK, panel=None, x=None)
        for column in along(index, f"after {seconds} s", shown=True, read=read_times(SECONDS))
    )
    return replace(kl, shown=seconds == SECONDS[-1]), reward


def spent(step: int) -> Pool:
    """Return a function that reads the seconds until the end of an optimizer step."""

    def read(paths: Sequence[Path], row: Row) -> tuple[float, None]:
        return read_seconds(paths)[step], None

    return read


def mark(index: int, step: int) -> tuple[Column, Column]:
    """Return the columns of the figure for an evaluation: seconds, and the reward over them."""
    title = f"seconds until step {step}"
    reward = Column(
        title=f"reward at step {step}", pool=pool(lambda path: float(path[1][index])), shown=False, x=title, panel=PANEL
    )
    return Column(title=title, pool=spent(step), stage=CLOCK, digits=0, shown=step == STEPS[-1]), reward


ITEMS = {
    "reward_time": Item(
        title="reward against time",
        sizes={
            "small": (
                Table(
                    rows=tuple(map(measure, make_rows(EXPERIMENT, methods=METHODS))),
                    timed=CLOCK, stored=True, seeds=SEEDS,
                    columns=(
                        *(column for i, seconds in enumerate(SECONDS) for column in at(i, seconds)),
                        *(column for i, step in enumerate(STEPS) for column in mark(i, step)),
                        *along(-1, "at the end", shown=True, panel=None),
                    ),
                    x_label="seconds of sampling, scoring and training",
                    errors=f"{len(SEEDS)} seeds. Errors are bootstraps over seeds and over prompts.",
                ),
            ),
        },
    ),
}  # fmt: skip
