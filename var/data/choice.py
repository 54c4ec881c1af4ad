"""Which responses of the rows train."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from var.data.rows import Rows
from var.utils.errors import Problems, UserError

Selection = Literal["chosen", "both", "best", "all"]


@dataclass(frozen=True)
class Choice:
    """The training responses. The two responses of a pair are adjacent, the better one first."""

    row: np.ndarray  # [n] index of the row
    response: np.ndarray  # [n] index of the response in its row
    counts: Counter[str] = field(default_factory=Counter)  # rows left out, by reason


def choose(rows: Rows, responses: Selection, rewards: np.ndarray | None = None) -> Choice:
    """Choose the responses to train on.

    Args:
        rows: All rows.
        responses: `all`; `chosen`, the first of an ordered row; `best`, the one with the highest reward; or `both`, the
            first and the last of an ordered row, and those with the highest and the lowest reward of another row.
            If these rewards are equal, the row is left out and counted.
        rewards: [N] those of all responses, row by row, if `needs_rewards`.
    """
    size, ordered, counts = rows.facts["responses"], rows.facts["ordered"], Counter[str]()
    counts["rows without a response"] = int((size == 0).sum())
    chosen = size > 0
    if responses == "all":
        return Choice(*rows.list_responses(), +counts)
    if responses == "chosen":
        _check_ordered(rows, np.flatnonzero(chosen & ~ordered))
        row = np.flatnonzero(chosen)
        return Choice(row, np.zeros_like(row), +counts)
    if responses == "both":
        counts["rows with fewer than two responses"] = int((size == 1).sum())
        chosen = size > 1
    first, last = np.zeros(len(rows), dtype=np.int64), size.astype(np.int64) - 1
    if len(compared := np.flatnonzero(chosen & ~(ordered & (responses == "both")))):
        if rewards is None:
            raise UserError(f"data.responses={responses} needs the rewards of all responses. Pass `rewards`")
        first[compared], last[compared] = _find_extremes(rewards, size, compared)
        if responses == "both":  # the first of equal rewards is both the highest and the lowest
            equal = compared[first[compared] == last[compared]]
            counts["rows whose responses all have the same reward"] = len(equal)
            chosen[equal] = False
    row = np.flatnonzero(chosen)
    if responses == "best":
        return Choice(row, first[row], +counts)
    return Choice(np.repeat(row, 2), np.stack([first[row], last[row]], axis=1).ravel(), +counts)


def _find_extremes(rewards: np.ndarray, size: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first highest and of the first lowest reward of each of these rows, in its row.

    Args:
        rewards: [N] of all responses, row by row.
        size: [R] responses of each row.
        rows: [n] rows with responses.
    """
    begin = np.cumsum(size[rows]) - size[rows]
    flat = np.repeat((np.cumsum(size) - size)[rows] - begin, size[rows]) + np.arange(size[rows].sum())
    found = []
    for extreme in (np.maximum, np.minimum):
        best = np.repeat(extreme.reduceat(rewards[flat], begin), size[rows])
        place = np.where(rewards[flat] == best, np.arange(len(flat)), len(flat))
        found.append(np.minimum.reduceat(place, begin) - begin)
    return found[0], found[1]


def _check_ordered(rows: Rows, unordered: np.ndarray) -> None:
    """Raise one error for rows without an order of preference, given their indices."""
    problems = Problems("data.responses=chosen does not fit these rows")
    for i in unordered.tolist():
        problems.add(f"row {rows[i].id}", "its responses are not ordered by preference. Set data.responses=best")
    problems.check()


def needs_rewards(rows: Rows, responses: Selection) -> bool:
    """Return whether `choose` needs rewards for these rows."""
    return responses == "best" or (responses == "both" and not rows.facts["ordered"].all())
