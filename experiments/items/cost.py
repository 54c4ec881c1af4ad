"""The items about cost: Table 4, VAR compared with GRPO, and Table 8, VAR compared with SFT and DPO."""

import json
from pathlib import Path
from typing import Any

from experiments.items.arithmetic import GAINS, PAIRS, SEEDS
from experiments.items.base import Column, Item, Row, Table, summary, train
from experiments.items.hha import PAPER_REWARDS, REWARD, make_rows, name_model

GIB = 2**-30
TIMES = (
    Column(title="annotation (s)", read=summary("seconds.annotating"), digits=0),
    Column(title="training (s)", read=summary("seconds.training"), digits=0),
)
MINUTE = ("experiment=[table4,frontier]", "model=smollm2-135m", "data=arithmetic", "strategy=auto")
GRPO = ("loss=grpo", "data.micro_batch=2")  # prompts, with four responses each

# Table 8: the same tokens for all


def peak(stage: str) -> Column:
    """Return a column with the peak memory of a stage: of a GPU's tensors, or of the process on a CPU."""

    def read(path: Path, row: Row) -> Any:
        found = (json.loads(path.read_text())["peak_memory"] or {}).get(stage)
        return None if found is None else GIB * found.get("allocated", found.get("resident"))

    return Column(title=f"peak memory, {stage} (GiB)", read=read, digits=2)


COSTS = (
    TIMES[1],
    Column(title="training time / SFT's", read=summary("seconds.training"), digits=2, ratio_to="SFT"),
    Column(title="tokens/s", read=summary("tokens_per_second"), digits=0),
    peak("training"),
    TIMES[0],
    peak("annotating"),
)


def compare(*words: str) -> tuple[Row, ...]:
    """Return the rows of Table 8. DPO and VAR run with stored reference log-probabilities and with a live reference."""
    losses = {
        "SFT": ("loss=sft",),
        "DPO, stored": ("loss=dpo",),
        "DPO, live": ("loss=dpo", "reference=live"),
        "VAR, stored": ("loss=var",),
        "VAR, live": ("loss=var", "reference=live"),
        "VAR with its own pairs, live": ("loss=var_own", "reference=live"),
    }
    return tuple(
        Row(label=label, stages={"train": train(*words, *loss, *(pairs if "dpo" in loss[0] else ()))})
        for pairs in [PAIRS if "model=smollm2-135m" in words else ()]
        for label, loss in losses.items()
    )


def paper_rows(name: str, after_sft: bool) -> tuple[Row, ...]:
    """Return the rows of Table 4 for a model: the base model, GRPO and VAR."""
    words, model = ("experiment=table4",), name_model(name)
    base, *_ = make_rows(words, {"reward": REWARD}, model=model, group=name)
    sft = Row(
        label="SFT",
        group=name,
        shown=False,
        stages={"train": train(*words, model, "loss=sft", "data.responses=chosen")},
    )
    continued = ("init={SFT}",) if after_sft else ()
    stages = {"reward": base.stages["reward"]}
    grpo = train(*words, model, *GRPO, "data.global_batch=16", *continued)
    return (
        base,
        Row(label="SFT+GRPO" if after_sft else "GRPO", group=name, stages={"train": grpo, **stages}),
        Row(label="VAR", group=name, stages={"train": train(*words, model, "loss=var"), **stages}),
        *([sft] if after_sft else []),
    )


ITEMS = {
    "table4": Item(
        title="VAR compared with GRPO, reward and time",
        sizes={
            "small": (
                Table(
                    rows=tuple(
                        Row(label=label, stages={"train": train(*MINUTE, *words)})
                        for label, words in {
                            "GRPO": (*GRPO, "data.global_batch=2"),
                            "VAR, the paper's": ("loss=var", "data.global_batch=8"),
                            "VAR, prompt": ("loss=var_prompt", "data.global_batch=8"),
                        }.items()
                    ),
                    columns=(*GAINS, *TIMES, Column(title="optimizer steps", read=summary("steps"), digits=0)),
                    seeds=SEEDS, timed="train",
                ),
            ),
            "paper": (
                Table(
                    rows=(*paper_rows("Qwen2.5-3B", False), *paper_rows("Llama3.2-3B", True)),
                    columns=(*PAPER_REWARDS[:-1], *TIMES), timed="train",
                ),
            ),
        },
    ),
    "table8": Item(
        title="the cost of a step",
        sizes={
            "small": (
                Table(
                    rows=compare(
                        "experiment=[table8,hha]", "model=smollm2-135m", "strategy=auto", "data.global_batch=8",
                        "trainer.max_steps=12", "eval=off",
                    ),
                    columns=COSTS, timed="train",
                ),
            ),
            "paper": (Table(rows=compare("experiment=table8"), columns=COSTS, timed="train"),),
        },
    ),
}  # fmt: skip
