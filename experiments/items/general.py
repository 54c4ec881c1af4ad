"""The items that train on UltraFeedback: Tables 5, 6 and 7, and Figure 4, which is about the estimate of Z."""

import json
from pathlib import Path
from typing import Any

from experiments.items.arithmetic import ESS, GAINS, SEEDS, pick
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
    record,
    select,
    study,
    summary,
    train,
)
from experiments.items.hha import SMALL_ROWS, rate

# Benchmarks


def read_score(name: str, metric: str, extraction: str) -> Read:
    """Read a benchmark's score in percent, with its standard error over documents."""

    def read(path: Path, row: Row) -> Any:
        wanted = {"task": name, "metric": metric, "extraction": extraction}
        for score in json.loads(path.read_text())["benchmarks"]["scores"]:
            if all(score[key] == value for key, value in wanted.items()):
                return 100 * score["value"], None if score["se"] is None else 100 * score["se"]
        raise KeyError(f"{name}, {metric}, {extraction}")

    return read


def average(*reads: Read) -> Read:
    """Read the mean of several numbers."""

    def read(path: Path, row: Row) -> Any:
        return sum(one(path, row)[0] for one in reads) / len(reads)

    return read


def make_columns(tasks: dict[str, tuple[str, str, str]]) -> tuple[Column, ...]:
    """Return a column for each benchmark, and their average."""
    reads = {title: read_score(*task) for title, task in tasks.items()}
    reads["Avg."] = average(*reads.values())
    return tuple(Column(title=title, stage="benchmarks", read=read, digits=2) for title, read in reads.items())


COT = ("exact_match", "get-answer")
PAPER_SCORES = make_columns(
    {
        "MMLU": ("mmlu", "acc", "none"),
        "GSM8K": ("gsm8k", "exact_match", "flexible-extract"),
        "HumanEval": ("humaneval", "pass@1", "create_test"),
        "BBH": ("bbh", *COT),
    }
)
SMALL_SCORES = make_columns(
    {
        "GSM8K": ("gsm8k", "exact_match", "flexible-extract"),
        **{
            f"BBH {name.replace('_', ' ')}": (f"bbh_cot_fewshot_{name}", *COT)
            for name in ("boolean_expressions", "date_understanding", "object_counting")
        },
    }
)
PAPER_BENCHMARKS = evaluate(
    "data=ultrafeedback", "data.source.keep=best", "data.sample=10064", "prompts=16", "reference=null",
    "reward=offsetbias-rm-8b", "generate.max_new_tokens=512", "precision=bfloat16", "benchmarks=paper",
    "benchmarks.unsafe_code=true",
)  # fmt: skip
SMALL_BENCHMARKS = evaluate(
    "prompts=2", "seeds=[0]", "generate.max_new_tokens=8", "reference=null", "benchmarks=local",
    "~benchmarks.tasks.bbh_cot_fewshot_word_sorting", "benchmarks.limit=24", "benchmarks.max_new_tokens=96",
    "benchmarks.batch=8",
)  # fmt: skip
DPO = ("loss=dpo", "~loss.temperature_unit", "data.source.keep=best_worst")
ALOL = ("loss=alol", "~loss.temperature_unit", "reward_scale=sigmoid")


def make_rows(name: str, group: str, losses: dict[str, tuple[str, ...]], stages: dict[str, Command]) -> tuple[Row, ...]:
    """Return rows of Table 5's configuration. A loss without overrides is the untrained model."""
    model = f"model={name}"
    stages = add_words(stages, model)
    return tuple(
        Row(
            label=label, group=group,
            stages={**({"train": train("experiment=table5", model, *words)} if words else {}), **stages},
        )
        for label, words in losses.items()
    )  # fmt: skip


METHODS = {"Base": (), "DPO": DPO, "A-LoL": ALOL, "VAR": ("loss=var",)}

# Chat benchmarks

CHAT: tuple[str, ...] = ("held_out=false", "against=chosen", "reference=null", "seeds=[0]", "reward=offsetbias-rm-8b")
CHAT += ("generate.max_new_tokens=2048", "precision=bfloat16")
CHATS = {
    "alpaca": evaluate("data=alpaca_eval", "judge=alpaca_eval_2", *CHAT),
    "arena": evaluate("data=arena_hard", "judge=arena_hard", *CHAT),
}
SMALL_CHAT = evaluate(
    "data=files", "held_out=false", "prompts=60", "seeds=[0]", "against=chosen", "reference=null", "judge=reward",
    "reward=classifier", "reward.path={reward model}", "generate.max_new_tokens=96",
)  # fmt: skip


# The number of rows that estimate Z

BATCHES = ("B = 2", "B = 4", "B = 8", "8∗: 8 sampled candidates")
DRAWS = "Errors are over three draws of each world."
WORLDS = ("shared", "apart", "long")
FIXED = tuple(
    Column(
        title=world, stage="exact",
        read=record("fixed", "kl_optimum_policy", world=world, temperature=1.0),
    )
    for world in WORLDS
)  # fmt: skip


def solve(rows: dict[str, tuple[str, int]]) -> tuple[Row, ...]:
    """Return rows of the testbed's study of fixed points: the name of a weight there, and B or the candidates."""
    return tuple(
        Row(label=label, stages={"exact": study("fixed")}, where={"estimator": name, "size": size})
        for label, (name, size) in rows.items()
    )


EXACT = solve(
    {
        "nothing: SFT": ("sft", 8),
        "B = 2": ("in_batch mean", 2),
        "B = 4": ("in_batch mean", 4),
        "B = 8": ("in_batch mean", 8),
        BATCHES[-1]: ("sampled", 8),
    }
)
READINGS = {
    "mean over tokens": ("in_batch mean", 8),
    "sum over tokens": ("in_batch sum", 8),
    "mean over tokens, of the rows' own pairs": ("in_batch mean, own", 8),
    "sum over tokens, not in the numerator: as printed": ("in_batch sum, not in the numerator", 8),
}

# The variance of Z's estimate

SIZES = (2, 4, 8, 16, 32)
ESTIMATORS = {
    "(a) in-batch": "in-batch, token means",
    "in-batch, without π_ref": "in-batch, without π_ref",
    "(b) sampled": "sampled",
}


def variances(*words: str) -> tuple[Row, ...]:
    """Return a row for each estimator, all of one measurement."""
    command = Command(("experiments/figure4/run.py",), ("{own}", "seed={seed}", *words), "tables.json")
    return tuple(
        Row(label=label, stages={"variance": command}, where={"estimator": name}) for label, name in ESTIMATORS.items()
    )


VARIANCES = tuple(
    Column(
        title=f"{title}, {size}", stage="variance", read=record("partition", key, size=size), panel=panel, x=size,
        digits=4 if key == "variance" else 3,
    )
    for title, key, panel in (
        ("Var(Ẑ)/Z²", "variance", "Var(Ẑ)/Z²"),
        ("Var(Ẑ)/E[Ẑ]²", "relative_variance", "Var(Ẑ)/E[Ẑ]²"),
        ("spread of log E[Ẑ]/Z", "log_bias_spread", "spread of log E[Ẑ]/Z over prompts"),
    )
    for size in SIZES
)  # fmt: skip
ANSWERS = "Errors are over the prompts' own answers, if a prompt has several."
X = "B (in-batch) or candidates (sampled)"

ITEMS = {
    "table5": Item(
        title="general abilities after training on UltraFeedback",
        sizes={
            "small": (
                Table(
                    rows=evaluate_rows((Row(label="Base"), *pick("DPO", "A-LoL", "VAR")), benchmarks=SMALL_BENCHMARKS),
                    columns=(*SMALL_SCORES, *GAINS[2:]),
                ),
            ),
            "paper": (
                Table(
                    rows=(
                        *make_rows("llama2-7b", "Llama2-7B", METHODS, {"benchmarks": PAPER_BENCHMARKS}),
                        *make_rows("qwen2.5-7b", "Qwen2.5-7B", METHODS, {"benchmarks": PAPER_BENCHMARKS}),
                    ),
                    columns=PAPER_SCORES,
                ),
            ),
        },
    ),
    "table6": Item(
        title="AlpacaEval 2.0 and Arena-Hard 0.1",
        sizes={
            "small": (
                Table(
                    rows=evaluate_rows(select(SMALL_ROWS, "Base", "DPO", "VAR"), chat=SMALL_CHAT),
                    columns=(
                        rate("AlpacaEval's prompts: win rate by a reward model (%)", "chat"),
                        Column(
                            title="response length (tokens)", stage="chat", digits=1,
                            read=summary("model.subsets.files.length"),
                        ),
                    ),
                ),
            ),
            "paper": (
                Table(
                    rows=make_rows("qwen2.5-7b", "", {name: METHODS[name] for name in ("Base", "DPO", "VAR")}, CHATS),
                    columns=(
                        rate("AlpacaEval 2.0 LC (%)", "alpaca", summary("win_rates.facts.lc_win_rate")),
                        rate("AlpacaEval 2.0 WR (%)", "alpaca"),
                        rate("Arena-Hard 0.1 WR (%)", "arena"),
                    ),
                ),
            ),
        },
    ),
    "table7": Item(
        title="the number of rows that estimate Z",
        sizes={
            "small": (
                Table(
                    title="A real model", rows=pick(*BATCHES, "SFT on all answers"), columns=(*GAINS, ESS), seeds=SEEDS
                ),
                Table(
                    title="The exact testbed: KL(π* ‖ π) of the policy to which the weight leads",
                    rows=EXACT, columns=FIXED, errors=DRAWS,
                ),
                Table(
                    title="How log π_ref in Eq. 10 is read, a real model. `loss=var` takes the first reading",
                    rows=pick(*READINGS), columns=(*GAINS, ESS), seeds=SEEDS,
                ),
                Table(
                    title="How log π_ref in Eq. 10 is read, the exact testbed",
                    rows=solve(READINGS), columns=FIXED, errors=DRAWS,
                ),
            ),
            "paper": (
                Table(
                    rows=make_rows(
                        "qwen2.5-7b", "",
                        {
                            **{f"B = {size}": ("loss=var", f"data.micro_batch={size}") for size in (2, 4)},
                            "B = 8": METHODS["VAR"],
                            BATCHES[-1]: ("loss=var_sampled",),
                        },
                        {"benchmarks": PAPER_BENCHMARKS},
                    ),
                    columns=PAPER_SCORES,
                ),
            ),
        },
    ),
    "figure4": Item(
        title="the variance of Z's estimate",
        sizes={
            "small": (
                Table(
                    rows=variances("reward=near_number", "data.source.problems=32", "generate.responses=32"),
                    columns=VARIANCES,
                    x_label=X, errors=ANSWERS,
                ),
            ),
            "paper": (Table(rows=variances("experiment=figure4"), columns=VARIANCES, x_label=X, errors=ANSWERS),),
        },
    ),
}  # fmt: skip
