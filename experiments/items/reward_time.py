"""Reward against time: how much reward each method has after some seconds of sampling, scoring and training."""

from experiments.items.base import Column, Item, Row, Table, summary, train
from experiments.items.methods import GROUPS, METHODS, RATE, RATES, tune
from experiments.items.paths import PANEL, along, read_times

TIMED = ("SFT on the best of 4", "VAR, grouped", "VAR, grouped, roulette", "DPO", "RLOO", "GRPO")
BUDGET = ("trainer.max_steps=-1", "trainer.max_seconds=240", "eval.every_n_steps=12")
SECONDS = (60, 120, 180, 240)
READ = read_times(SECONDS)


def make_rows() -> tuple[Row, ...]:
    """Return the rows: methods on answers that are sampled once, and methods that sample while they train."""
    if not {"GRPO", "VAR, online"} <= set(RATES):
        return ()
    online = tune("VAR, online")
    rows = {
        **{method: tune(method) for method in METHODS if method in TIMED and method in RATES},
        "DAPO": ("loss=dapo", *GROUPS, f"{RATE}={RATES['GRPO']:g}"),
        "VAR, online": online,
        "VAR, online, with a baseline": (*online, "loss.baseline=true"),
        "VAR, iterated: rollouts of 8 steps": (*online, "loss.rollout.steps=8"),
    }
    return tuple(
        Row(label=label, stages={"train": train("experiment=reward_kl", *words, *BUDGET)})
        for label, words in rows.items()
    )


def at(index: int, seconds: int) -> tuple[Column, Column]:
    """Return the columns of the KL and the reward after some seconds."""
    shown = seconds in (60, 120, 240)
    kl, reward = along(index, f"after {seconds} s", shown=shown, read=READ)
    return kl, Column(title=reward.title, pool=reward.pool, shown=shown, x=float(seconds), panel=PANEL)


ROWS = make_rows()
ITEMS = {
    "reward_time": Item(
        title="reward against time",
        sizes={
            "small": (
                Table(
                    rows=ROWS, timed=True, stored=True, seeds=(0, 1, 2),
                    columns=(
                        *(column for i, seconds in enumerate(SECONDS) for column in at(i, seconds)),
                        Column(title="optimizer steps", read=summary("steps"), digits=0),
                    ),
                    x_label="seconds of sampling, scoring and training",
                    errors="3 seeds. Errors are bootstraps over seeds and over prompts.",
                ),
            ) if ROWS else (),
        },
    ),
}  # fmt: skip
