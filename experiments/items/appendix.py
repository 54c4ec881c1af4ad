"""The arguments of the paper's appendix, for which it has no experiment: A.1 and A.2."""

from experiments.items.arithmetic import GAINS, SEEDS, pick
from experiments.items.base import Column, Item, Row, Table, metric, record, study

RATIOS = Table(
    title="The exact testbed: final probability of an answer with reward 1.0, divided by that of one with reward 0.9",
    rows=tuple(
        Row(label=label, stages={"exact": study("argument")}, where={"part": "close rewards", "objective": objective})
        for label, objective in {
            "VAR, λ = 1": "var, λ = 1.0",
            "VAR, λ = 0.1": "var, λ = 0.1",
            "R-LoL, the ratio held at 1": "r_lol",
            "R-LoL, ε = 0.2": "r_lol, clip 0.2",
            "R-LoL, ε = 0.9": "r_lol, clip 0.9",
            "A-LoL, V = 0.8": "a_lol, V = 0.8",
            "A-LoL, V = 0.95": "a_lol, V = 0.95",
        }.items()
    ),
    columns=(Column(title="ratio", stage="exact", read=record("argument", "apart")),),
)
LOSS = tuple(Column(title=f"loss at step {step}", read=metric("train/loss", step), digits=2) for step in (1, 5, 10, 20))
BOUND = Table(
    errors="Errors are over three draws of each world.",
    title="The exact testbed, 4,096 rows drawn from π_ref",
    rows=tuple(
        Row(label=world, stages={"exact": study("argument")}, where={"part": "bound", "world": world, "rows": 4096})
        for world in ("shared", "apart", "long")
    ),
    columns=tuple(
        Column(title=title, stage="exact", read=record("argument", key))
        for title, key in {
            "minimum of the loss": "least",
            "bound per prompt": "bound",
            "entropy of a batch's weights": "batch_entropy",
        }.items()
    ),
)  # fmt: skip
ITEMS = {
    "appendix_a1": Item(
        title="a clipped ratio and close rewards",
        sizes={
            "small": (
                RATIOS,
                Table(title="A real model", rows=pick("R-LoL", "A-LoL", "VAR, prompt"), columns=GAINS, seeds=SEEDS),
            ),
            "paper": (RATIOS,),
        },
    ),
    "appendix_a2": Item(
        title="a lower bound of the loss",
        sizes={
            "small": (
                BOUND,
                Table(
                    title="A real model",
                    seeds=SEEDS,
                    rows=pick("VAR, prompt", "A-LoL, KL form"),
                    columns=(*LOSS, *GAINS),
                ),
            ),
            "paper": (BOUND,),
        },
    ),
}
