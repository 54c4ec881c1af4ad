"""The default run, `python train.py`, compared with the same weights without roulette and with DPO."""

from experiments.items.arithmetic import ESS, GAINS, PAIRS
from experiments.items.base import Column, Item, Row, Table, summary, train

RUNS = {
    "`loss=var_roulette`: the default run": ("loss=var_roulette",),
    "`loss=var_grouped`": ("loss=var_grouped",),
    "`loss=dpo`, on pairs": ("loss=dpo", *PAIRS),
}
ITEMS = {
    "default": Item(
        title="the default run",
        sizes={
            "small": (
                Table(
                    rows=tuple(Row(label=label, stages={"train": train(*words)}) for label, words in RUNS.items()),
                    columns=(*GAINS, ESS, Column(title="optimizer steps", read=summary("steps"), digits=0)),
                    seeds=(0, 1, 2), stored=True,
                ),
            ),
        },
    ),
}  # fmt: skip
