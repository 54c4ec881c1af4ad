"""Degenerate rows: they train nothing, or something that nobody meant. Counted before anything is computed."""

from collections import Counter
from collections.abc import Collection

import numpy as np

from var.data.row import (
    EQUAL_PAIRS,
    EQUAL_RESPONSES,
    EQUAL_SCORES,
    KINDS,
    ONLY_END,
    REVERSED_SCORES,
    find_degenerate,
)
from var.data.rows import Rows
from var.utils.console import warn

SAME_PROMPT = "rows with the prompt of an earlier row"
SHARED = "validation prompts that also train, but for case and spaces"

WARNINGS: dict[str, tuple[float, str]] = {
    EQUAL_RESPONSES: (0.2, "A repeated response counts several times."),
    EQUAL_PAIRS: (0, "They teach no preference."),
    EQUAL_SCORES: (0.1, "Their order is not that of the scores."),
    REVERSED_SCORES: (0.5, "Check which column is the better response; data.columns can exchange them."),
    ONLY_END: (0, "They teach the model to answer with nothing."),
    SAME_PROMPT: (0, "Their sampled responses are the same."),
    SHARED: (0, "Validation does not measure generalization on them."),
}
"""The fraction of rows above which a count is printed as a warning, and why it matters."""


def count_degenerate(rows: Rows, validation: Rows, special: Collection[str], sampled: bool) -> Counter[str]:
    """Return how many training rows are degenerate, by kind.

    Args:
        rows: the training rows.
        validation: rows of the validation prompts.
        special: the tokenizer's special tokens.
        sampled: whether responses to the prompts are sampled, with random numbers that depend on the prompt.
    """
    facts = rows.facts
    counts = Counter({kind: int((facts["kinds"] >> n & 1).sum()) for n, kind in enumerate(KINDS)})
    suspects = (rows[i] for i in np.flatnonzero(facts["suspect"]).tolist())
    counts[ONLY_END] = sum(ONLY_END in find_degenerate(row, special) for row in suspects)
    counts[SAME_PROMPT] = len(rows) - len(np.unique(rows.keys)) if sampled else 0
    counts[SHARED] = len(np.intersect1d(facts["text"], validation.facts["text"]))
    return +counts


def warn_of_degenerate(counts: Counter[str], total: int) -> None:
    """Print a warning for each count that is likely a mistake. total: the number of training rows."""
    for name, count in counts.items():
        fraction, reason = WARNINGS[name]
        if count > fraction * total:
            warn(f"{name}: {count} of {total} rows. {reason}" if name != SHARED else f"{name}: {count}. {reason}")
