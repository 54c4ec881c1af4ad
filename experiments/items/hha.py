"""The items whose models are evaluated on HHA: Tables 1, 2, 3 and 9, and Figures 1, 2 and 3."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.items.arithmetic import GAINS, SEEDS, pick
from experiments.items.base import (
    Column,
    Command,
    Item,
    Read,
    Row,
    Table,
    add_words,
    evaluate,
    evaluate_rows,
    metric,
    sample,
    select,
    summary,
    train,
)

SUBSETS = ("harmless_base", "helpful_base", "helpful_online", "helpful_rejection")
METHODS = ("DPO", "VAR", "SFT+DPO", "SFT+VAR")
LLAMAS = ("Llama3.2-1B", "Llama3.2-3B", "Llama3.1-8B", "Llama2-13B")
INSTRUCT = tuple(f"{name}-Instruct" for name in LLAMAS[:3])
QWENS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B")
QUANTIZED = ("adapter=lora", "strategy=ddp", "data.global_batch=256", "model.learning_rate=1.0e-4")


def make_rows(
    words: tuple[str, ...],
    evaluations: dict[str, Command],
    pairs: tuple[str, ...] = (),
    model: str = "",
    group: str = "",
) -> tuple[Row, ...]:
    """Return the rows of a model: untrained, by DPO and VAR, and SFT with both after it.

    words: overrides of each training run. pairs: further overrides of DPO. model: an override of all commands.
    """
    chosen = (model,) if model else ()
    losses = {"DPO": ("loss=dpo", *pairs), "VAR": ("loss=var",)}
    evaluations = add_words(evaluations, *chosen)
    made = {
        "Base": None,
        "SFT": train(*words, *chosen, "loss=sft", "data.responses=chosen"),
        **{name: train(*words, *chosen, *loss) for name, loss in losses.items()},
        **{f"SFT+{name}": train(*words, *chosen, *loss, "init={SFT}") for name, loss in losses.items()},
    }
    return tuple(
        Row(label=name, group=group, stages={**({"train": command} if command else {}), **evaluations})
        for name, command in made.items()
    )


# The paper's size


def name_model(name: str) -> str:
    """Return the override that selects a model by its name in the paper."""
    return f"model={name.lower()}"


GENERATION = ("generate.max_new_tokens=512", "precision=bfloat16")
REWARD = evaluate(
    "data=hha", "+data@more.bias=offsetbias", "more.bias.validation_prompts=400", "held_out=[offsetbias]",
    "reference=null", "reward=offsetbias-rm-8b", *GENERATION,
)  # fmt: skip
JUDGE = evaluate(
    "data=hha", "held_out=false", "prompts=99", "against=chosen", "reference=null", "reward=offsetbias-rm-8b",
    "judge=mtbench", *GENERATION,
)  # fmt: skip


def score(title: str, keys: str) -> Column:
    """Return a column with the mean reward as 100·sigmoid."""
    return Column(title=title, stage="reward", read=summary(f"model.{keys}.reward_sigmoid"), digits=2)


PAPER_REWARDS = (
    *(score(subset.replace("_", " ").capitalize(), f"subsets.{subset}") for subset in SUBSETS),
    score("Avg. Helpful", "averages.helpful"),
    score("Avg. All", "averages.all of hha"),
    score("OffsetBias", "subsets.offsetbias"),
)


def make_models(models: tuple[str, ...], experiment: str, evaluations: dict[str, Command]) -> tuple[Row, ...]:
    """Return the rows of several models at the paper's size."""
    return tuple(
        row
        for name in models
        for row in make_rows((f"experiment={experiment}",), evaluations, model=name_model(name), group=name)
    )


INT4 = make_rows(
    ("experiment=table2", *QUANTIZED), {"reward": REWARD}, model="model=qwen2.5-32b-int4", group="Qwen2.5-32B-Int4"
)


def read_wins(subset: str | None = None) -> Read:
    """Read the win rate of a subset, or its mean over subsets, in percent, with its standard error over prompts."""

    def read(path: Path, row: Row) -> Any:
        found = json.loads(path.read_text())["win_rates"]
        subsets = [found["subsets"][subset]] if subset else list(found["subsets"].values())
        errors = [each["se_prompts"] for each in subsets]
        error = None if None in errors else math.hypot(*errors) / len(errors)
        return subsets[0]["win_rate"] if subset else found["average"], error

    return read


def rate(title: str, stage: str, read: Read | None = None) -> Column:
    """Return a column with a win rate in percent: the mean over subsets, or what `read` reads."""
    return Column(title=title, stage=stage, read=read or read_wins(), digits=2)


def share(subset: str, outcome: str, stage: str) -> Column:
    """Return a column with the percentage of a subset's comparisons that have an outcome."""

    def read(path: Path, row: Row) -> Any:
        counts = {name: summary(f"win_rates.subsets.{subset}.{name}")(path, row) for name in ("win", "tie", "loss")}
        return 100 * counts[outcome] / sum(counts.values())

    return Column(title=f"{subset.replace('_', '-')} {outcome}", stage=stage, read=read, digits=2)


PAPER_WINS = (
    *(share(subset, outcome, "judge") for subset in SUBSETS for outcome in ("win", "loss", "tie")),
    rate("average win (all)", "judge"),
)


def lengths(subsets: tuple[str, ...]) -> tuple[Column, ...]:
    """Return columns with the mean length of the responses in each subset, as bars."""
    return tuple(
        Column(
            title=f"{subset.replace('_', '-')}: tokens", stage="reward", digits=1, panel="tokens per response",
            read=summary(f"model.subsets.{subset}.length"),
        )
        for subset in subsets
    )  # fmt: skip


# The small size: SmolLM2-135M on 200 prompts of helpful-base; the reward model is of its size too

SMALL = ("experiment=[table1,hha]", "model=smollm2-135m", "strategy=auto")
REWARD_MODEL = Row(
    label="reward model", shown=False, once=True,
    stages={
        "train": train(
            "loss=bradley_terry", "data=hha", "data.source.order=score", "reward=score", "data.max_length=256",
            "data.micro_batch=4", "data.global_batch=16", "data.validation_prompts=400", "trainer.max_steps=60",
            "model.learning_rate=3.0e-5",
        )
    },
)  # fmt: skip
SMALL_REWARD = evaluate(
    "data=hha", "data.source.subsets=[harmless_base,helpful_online]", "held_out=false", "prompts=16", "against=chosen",
    "reference=null", "judge=reward", "reward=classifier", "reward.path={reward model}", "generate.max_new_tokens=48",
)  # fmt: skip
QUESTION = sample(
    "model=smollm2-135m", "strategy=auto", "data=prompts", "data.path=experiments/table9/prompt.txt",
    "reward=classifier", "reward.path={reward model}", "generate.responses=1", "generate.max_new_tokens=128",
)  # fmt: skip
SMALL_ROWS = (
    *make_rows(
        (*SMALL, "data.global_batch=8"), {"reward": SMALL_REWARD}, ("data.micro_batch=4", "data.global_batch=4")
    ),
    REWARD_MODEL,
)
MEASURED = ("harmless_base", "helpful_online")
SMALL_COLUMNS = (
    *(score(subset.replace("_", " ").capitalize(), f"subsets.{subset}") for subset in MEASURED),
    score("Avg. of both", "averages.all"),
    Column(title="gain in sentiment", read=summary("validation.reward.gain")),
    Column(title="KL from the initial policy (nats)", read=summary("validation.kl"), digits=2),
)
SMALL_WINS = (
    *(share(subset, outcome, "reward") for subset in MEASURED for outcome in ("win", "loss", "tie")),
    rate("average win", "reward"),
)


def win_bars(subsets: tuple[str, ...], stage: str) -> tuple[Column, ...]:
    """Return columns with the percentage of wins in each subset, as bars."""
    return tuple(
        Column(
            title=f"{subset.replace('_', '-')} win", stage=stage, digits=1, panel="wins against the chosen answers (%)",
            read=read_wins(subset),
        )
        for subset in subsets
    )  # fmt: skip


def read_case(key: str) -> Read:
    """Read a field of the single response in a file of `sample.py`."""

    def read(path: Path, row: Row) -> Any:
        found = json.loads(path.read_text())["responses"][0]
        return len(found["text"].split()) if key == "words" else found[key]

    return read


CASE = (
    Column(title="words", stage="case", read=read_case("words"), digits=0),
    Column(title="reward", stage="case", read=read_case("score"), digits=2),
    Column(title="answer", stage="case", read=read_case("text")),
)


def ask(rows: tuple[Row, ...], command: Command) -> tuple[Row, ...]:
    """Return the trained rows, each with an answer to Table 9's question in place of an evaluation."""
    return evaluate_rows(select(rows, "SFT", *(f"SFT+{name}" for name in ("VAR", "DPO")), "VAR", "DPO"), case=command)


EIGHT = ("data.global_batch=8",)
STEPS = (0, 4, 8, 12, 16, 20)
ALONG: tuple[str, ...] = ("experiment=[figure2,frontier]", "model=smollm2-135m", "data=arithmetic", "strategy=auto")
ALONG += ("trainer.max_seconds=null", "trainer.max_steps=20", "eval.every_n_steps=4")


def along(steps: tuple[int, ...]) -> tuple[Column, ...]:
    """Return columns with the validation reward and the KL after optimizer steps, as lines."""
    return tuple(
        Column(title=f"{short} at step {step}", read=metric(name, step), digits=digits, panel=panel, x=step)
        for short, name, digits, panel in (
            ("reward", "validation/reward", 3, "validation reward"),
            ("KL", "validation/kl", 2, "KL from the initial policy (nats)"),
        )
        for step in steps
        if step or short == "reward"
    )


LLAMA_8B = ("Llama3.1-8B",)
ITEMS = {
    "table1": Item(
        title="VAR compared with DPO on four Llamas",
        sizes={
            "small": (
                Table(rows=select(SMALL_ROWS, "Base", *METHODS), columns=SMALL_COLUMNS),
                Table(
                    title="The reward model: accuracy on validation pairs",
                    rows=(replace(REWARD_MODEL, shown=True),),
                    columns=tuple(
                        Column(title=f"{when} training", read=summary(f"validation.accuracy.{when}"))
                        for when in ("before", "after")
                    ),
                ),
            ),
            "paper": (Table(
                    rows=select(make_models(LLAMAS, "table1", {"reward": REWARD}), "Base", *METHODS),
                    columns=PAPER_REWARDS,
                ),),
        },
    ),
    "table2": Item(
        title="VAR compared with DPO on Qwen2.5, from 0.5B to 32B",
        sizes={
            "small": (Table(rows=pick("SFT", *METHODS), columns=GAINS, seeds=SEEDS),),
            "paper": (
                Table(
                    rows=select((*make_models(QWENS, "table2", {"reward": REWARD}), *INT4), "Base", *METHODS),
                    columns=PAPER_REWARDS,
                ),
            ),
        },
    ),
    "table3": Item(
        title="win rates of Instruct models against the chosen answers",
        sizes={
            "small": (Table(rows=select(SMALL_ROWS, "DPO", "VAR"), columns=SMALL_WINS),),
            "paper": (
                Table(
                    rows=select(make_models(INSTRUCT, "table3", {"judge": JUDGE}), "DPO", "VAR"),
                    columns=PAPER_WINS,
                ),
            ),
        },
    ),
    "table9": Item(
        title="five answers to one question",
        sizes={
            "small": (Table(rows=ask(SMALL_ROWS, QUESTION), columns=CASE),),
            "paper": (
                Table(
                    rows=ask(
                        make_models(LLAMA_8B, "table1", {}),
                        sample(
                            "experiment=table9", "data=prompts", "data.path=experiments/table9/prompt.txt",
                            "generate.responses=1",
                        ),
                    ),
                    columns=CASE,
                ),
            ),
        },
    ),
    "figure1": Item(
        title="win rates against the chosen answers",
        sizes={
            "small": (
                Table(
                    rows=select(SMALL_ROWS, "SFT", *METHODS),
                    columns=(*win_bars(MEASURED, "reward"), SMALL_WINS[-1]),
                ),
            ),
            "paper": (
                Table(
                    rows=select(
                        (
                            *make_models(LLAMAS, "table1", {"judge": JUDGE}),
                            *make_models(QWENS, "table2", {"judge": JUDGE}),
                        ),
                        *METHODS,
                    ),
                    columns=(*win_bars(SUBSETS, "judge"), rate("average win", "judge")),
                ),
            ),
        },
    ),
    "figure2": Item(
        title="validation reward along training",
        sizes={
            "small": (
                Table(
                    rows=(
                        Row(
                            label="DPO",
                            stages={
                                "train": train(*ALONG, "loss=dpo", "data.micro_batch=4", "data.global_batch=4")
                            },
                        ),
                        Row(label="VAR", stages={"train": train(*ALONG, "loss=var", *EIGHT)}),
                        Row(label="VAR, prompt", stages={"train": train(*ALONG, "loss=var_prompt", *EIGHT)}),
                    ),
                    columns=along(STEPS), x_label="optimizer step",
                ),
            ),
            "paper": (
                Table(
                    rows=select(make_models(LLAMAS[:3], "figure2", {}), "DPO", "VAR"),
                    columns=along(tuple(range(0, 501, 20))), x_label="optimizer step",
                ),
            ),
        },
    ),
    "figure3": Item(
        title="lengths of the answers",
        sizes={
            "small": (
                Table(
                    rows=select(SMALL_ROWS, "SFT", *METHODS),
                    columns=lengths(MEASURED),
                ),
            ),
            "paper": (
                Table(
                    rows=select(make_models(LLAMA_8B, "table1", {"reward": REWARD}), "SFT", *METHODS),
                    columns=lengths(SUBSETS),
                ),
            ),
        },
    ),
}  # fmt: skip
