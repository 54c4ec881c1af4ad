"""What a method makes of its data: more answers per prompt, and rewards that are wrong."""

from experiments.items.base import Item, Row, Table
from experiments.items.methods import RATES, make_run, tune
from experiments.items.paths import DISTANCES, END, RIGHT_ANSWERS, within

EXPERIMENT = "experiment=reward_kl"
ANSWERS = (2, 4, 8, 16)
FLIPS = (0.0, 0.1, 0.2)
FLIPPED = ("reward=custom", "reward._target_=experiments.flipped.FlippedNumber", "+reward@eval.reward=exact_number")
COLUMNS = (*map(within, DISTANCES), *END)
ERRORS = "1 seed. Errors are bootstraps over prompts."


def make_rows(methods: tuple[str, ...], **variants: tuple[str, ...]) -> tuple[Row, ...]:
    """Return a row per method and variant, with the method's tuned values."""
    return tuple(
        Row(group=method.replace("of 4", "of K"), label=label, stages=make_run(EXPERIMENT, tune(method), *words))
        for method in methods
        if method in RATES
        for label, words in variants.items()
    )


ITEMS = {
    "reward_data": Item(
        title="reward against data",
        sizes={
            "small": (
                Table(
                    title="Answers per prompt",
                    rows=make_rows(
                        ("SFT on the best of 4", "VAR, prompt", "VAR, grouped"),
                        **{f"K = {k}": (f"generate.responses={k}",) for k in ANSWERS},
                    ),
                    columns=(*COLUMNS, RIGHT_ANSWERS), stored=True, errors=ERRORS,
                ),
                Table(
                    title="Wrong rewards",
                    rows=make_rows(
                        ("SFT on right answers", "VAR, prompt", "VAR, grouped", "DPO", "GRPO"),
                        **{f"{rate:.0%} flipped": (*FLIPPED, f"+reward.rate={rate:g}") for rate in FLIPS},
                    ),
                    columns=COLUMNS, stored=True, errors=ERRORS,
                ),
            ) if RATES else (),
        },
    ),
}  # fmt: skip
