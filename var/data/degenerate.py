"""Degenerate rows: they train nothing, or something that nobody meant. Counted before anything is computed."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from var.data.messages import Message, texts_in
from var.data.rows import Row, Rows
from var.utils.console import warn

ENDS = re.compile(r"(<\|[^<>|]{1,40}\|>|</s>|<eos>|<end_of_turn>|\s)+")
"""Control tokens of common models, which may be another model's than the one that trains."""

EQUAL_RESPONSES = "rows with a repeated response"
EQUAL_PAIRS = "pairs of equal responses"
EQUAL_SCORES = "pairs with equal scores"
REVERSED_SCORES = "pairs whose rejected response has the higher score"
ONLY_END = "rows with a response of control tokens only"
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
    held_out = {normalize(row.prompt) for row in validation}
    counts, shared = Counter[str](), set[str]()
    for row in rows:
        counts.update(find_degenerate(row, special))
        shared |= {normalize(row.prompt)} & held_out
    counts[SAME_PROMPT] = len(rows) - len(np.unique(rows.keys)) if sampled else 0
    counts[SHARED] = len(shared)
    return +counts


def find_degenerate(row: Row, special: Collection[str] = ()) -> Iterator[str]:
    """Yield the kinds of degenerate rows that a row belongs to."""
    contents = [(r.text.strip(), json.dumps(dict(r.message), sort_keys=True)) for r in row.responses]
    if len(set(contents)) < len(contents):
        yield EQUAL_RESPONSES
    if any(text and message == "{}" and _has_no_word(text, special) for text, message in contents):
        yield ONLY_END
    if not row.ordered or len(contents) < 2:
        return
    if contents[0] == contents[-1]:
        yield EQUAL_PAIRS
    best, worst = row.responses[0].score, row.responses[-1].score
    if best is not None and worst is not None and best <= worst:
        yield EQUAL_SCORES if best == worst else REVERSED_SCORES


def _has_no_word(text: str, special: Collection[str]) -> bool:
    for token in special:
        text = text.replace(token, "")
    return not text.strip() or ENDS.fullmatch(text) is not None


def normalize(prompt: Sequence[Message]) -> str:
    """Return the texts of a prompt without case and repeated spaces."""
    return " ".join(" ".join(texts_in(list(prompt))).casefold().split())


def warn_of_degenerate(counts: Counter[str], total: int) -> None:
    """Print a warning for each count that is likely a mistake. total: the number of training rows."""
    for name, count in counts.items():
        fraction, reason = WARNINGS[name]
        if count > fraction * total:
            warn(f"{name}: {count} of {total} rows. {reason}" if name != SHARED else f"{name}: {count}. {reason}")
