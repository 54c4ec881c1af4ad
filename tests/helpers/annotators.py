"""An annotator of the tiny model on a few rows, and what it needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.models import pretrained
from var.annotate.annotator import Annotator
from var.annotate.cache import AnnotationCache
from var.data.choice import choose
from var.data.plan import make_plan
from var.data.read import read
from var.data.row import Response, Row
from var.data.rows import Rows
from var.data.sequences import Sequences, encode
from var.models.frozen import FrozenModel
from var.sampling.base import Sampling

SAMPLING = Sampling(responses=2, temperature=1.0, top_p=1.0, max_new_tokens=4, batch=4, batch_tokens=4096, seed=0)
ROWS = tuple(
    Row(
        id=f"row-{i}",
        prompt=({"role": "user", "content": "what is " + "?" * (i + 1)},),
        responses=tuple(
            Response(text=f"it is {i}" + "!" * (3 * i % 5 + 2 * k), score=i + 0.5 * k, finished=(i + k) % 3 > 0)
            for k in range(2 if i % 4 == 0 else 1)
        ),
        answer=str(i),
    )
    for i in range(6)
)
"""Six rows with eight responses: two to prompts 0 and 4, one to the others. Some have no end token."""


@dataclass(frozen=True)
class RowSource:
    """A data source of rows that a test makes."""

    rows: tuple[Row, ...]

    def records(self) -> Any:
        return ((row.id, row) for row in self.rows)

    def row(self, where: str, record: Row) -> Row:
        return record

    def fingerprint(self) -> dict[str, Any]:
        return {"rows": repr(self.rows)}


@dataclass
class Lengths:
    """The response's length, plus 100 if it contains the answer. Records what it is asked."""

    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    nan_for: str | None = None

    scores_text = True

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"program": "lengths"}

    def __call__(self, prompts: Any, responses: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        self.asked.extend((p[-1]["content"], r, a) for p, r, a in zip(prompts, responses, answers, strict=True))
        return [
            float("nan") if r == self.nan_for else len(r) + 100.0 * (a is not None and a in r)
            for r, a in zip(responses, answers, strict=True)
        ]


def make_annotator(folder: Path, root: Path, reward: Any = None, **options: Any) -> Annotator:
    """Return the annotator of a new process: nothing is loaded, the cache on disk is unchanged."""
    reference = FrozenModel(pretrained(folder, root / "cache"), "cpu")
    return Annotator(AnnotationCache(root / "store"), reference, reward or Lengths(), root / "cache", **options)


def make_sequences(annotator: Annotator, rows: tuple[Row, ...] = ROWS, max_length: int = 128) -> tuple[Rows, Sequences]:
    """Return the rows, and all their responses as tokens."""
    loaded = read(RowSource(rows), annotator.cache)
    choice = choose(loaded, "all")
    return loaded, encode(loaded, choice, annotator.chat, max_length, "error", False, annotator.cache)


def make_micro(sequences: Sequences, size: int) -> np.ndarray:
    """Return the micro-batches of a plan, `size` sequences each."""
    return make_plan(sequences.length, 1, size, size, 3, "keep", "keep").micro


def split_tokens(sequences: Sequences, index: int) -> tuple[list[int], list[int]]:
    """Return a sequence's prompt and response."""
    ids, start, _ = sequences.tokens(index)
    return ids[:start], ids[start:]


def policy_is_loaded(annotator: Annotator) -> bool:
    """Return whether the reference's weights have been loaded."""
    return "policy" in vars(annotator.reference)
