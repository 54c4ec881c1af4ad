"""Reward against KL: how much reward each method has when it is at most some distance from the reference."""

from experiments.items.base import Column, Item, Row, Table, summary, train
from experiments.items.methods import METHODS, OTHERS, TUNED, list_rates, make_rows, make_run, tune
from experiments.items.paths import DISTANCES, END, RIGHT_ANSWERS, along, limit, within

EXPERIMENT = "experiment=reward_kl"
EXACT = "reward=exact_number"
SEEDS = (0, 1, 2)
STEPS = (0, 12, 24, 36)
"""Optimizer steps after which the runs are evaluated."""
SHORTER = ("data.source.skip=224", "data.source.problems=160", "trainer.max_steps=18", "eval.every_n_steps=null")
"""Problems that the comparison does not have, and fewer steps."""
CONTROL = Row(label="SFT on all answers", stages={"train": train(EXPERIMENT, "loss=sft")})
MAIN = ("SFT on right answers", "VAR, prompt", "VAR, grouped", "DPO", "GRPO", "VAR, online")
"""The methods that are compared with a second reward."""
COLUMNS = (
    *map(within, DISTANCES),
    *(column for i, step in enumerate(STEPS[:-1]) for column in along(i, f"at step {step}")),
    *along(-1, "at the end", shown=True),
    *map(limit, (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)),
)
ESS = Column(title="effective sample size / n", read=summary("ess"), digits=2)
TUNING_TITLE, RATES_TITLE = "λ and β", "Learning rates"


def make_limits(*words: str) -> tuple[Row, ...]:
    """Return the rows of the two limits, from 64 answers of the reference to each held-out prompt."""
    stages = {"train": train(EXPERIMENT, "loss=sft", "eval.sampling.responses=64", "trainer.max_seconds=0", *words)}
    paths = {"optimum of RLHF, all λ": "optimum", "best of n": "best of n"}
    return tuple(Row(label=label, where={"path": path}, once=True, stages=stages) for label, path in paths.items())


ITEMS = {
    "reward_kl": Item(
        title="reward against KL",
        sizes={
            "small": (
                Table(
                    title="At equal numbers of steps", rows=(*make_limits(), CONTROL, *make_rows(EXPERIMENT)),
                    columns=(*COLUMNS, RIGHT_ANSWERS, ESS), seeds=SEEDS, x_label="KL from the reference (nats)",
                    stored=True, errors=f"{len(SEEDS)} seeds. Errors are bootstraps over seeds and over prompts.",
                ),
                Table(
                    title="With a reward of 0 or 1",
                    rows=(*make_limits(EXACT), *make_rows(EXPERIMENT, EXACT, methods=MAIN)), columns=COLUMNS,
                    seeds=SEEDS, x_label="KL from the reference (nats)",
                    stored=True, errors=f"{len(SEEDS)} seeds. Errors are bootstraps over seeds and over prompts.",
                ),
                Table(
                    title="Other methods, not tuned",
                    rows=tuple(
                        Row(label=method, stages={"train": train(EXPERIMENT, *words)})
                        for method, words in OTHERS.items()
                    ),
                    columns=(*map(within, DISTANCES), *END, RIGHT_ANSWERS),
                    stored=True, errors="1 seed. Errors are bootstraps over prompts.",
                ),
                Table(
                    title=TUNING_TITLE,
                    rows=tuple(
                        Row(
                            group=method, label=f"{key.split('.')[-1]} = {value:g}",
                            stages=make_run(EXPERIMENT, (*words, f"{key}={value:g}"), *SHORTER),
                        )
                        for method, (words, key, values) in METHODS.items()
                        for value in values
                    ),
                    columns=(*map(within, DISTANCES), *END, ESS),
                    stored=True,
                    errors="1 seed, other problems, learning rate 2e-5. Errors are bootstraps over prompts.",
                ),
                Table(
                    title=RATES_TITLE,
                    rows=tuple(
                        Row(
                            group=method, label=f"learning rate = {rate:g}",
                            stages=make_run(EXPERIMENT, tune(method, rate), *SHORTER),
                        )
                        for method, (_, key, _) in METHODS.items()
                        if not key or method in TUNED
                        for rate in list_rates(method)
                    ),
                    columns=(*map(within, DISTANCES), *END),
                    stored=True, errors="1 seed, other problems, tuned λ or β. Errors are bootstraps over prompts.",
                ),
            ),
        },
    ),
}  # fmt: skip
