"""Responses of rows as tokens, in parts that several processes share."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from var.data.chat import Chat, Encoded
from var.data.choice import Choice
from var.data.row import Row
from var.data.rows import Rows
from var.data.settings import Overlong
from var.utils.processes import map_in_order

CHUNK = 1000  # responses that are tokenized together; even, so that pairs stay together
PARALLEL = 20_000  # responses from which on several processes tokenize
ERRORS = "sequences that are errors"
FEATURES = datasets.Features({"ids": datasets.List(datasets.Value("int32")), "name": datasets.Value("string")})
FACTS = np.dtype(
    [
        ("row", "i8"),
        ("response", "i4"),
        ("start", "i4"),
        ("length", "i4"),
        ("group", "i8"),
        ("score", "f8"),
        ("weight", "f8"),
    ]
)
"""What is asked of all sequences, kept apart from the tokens: see the properties of `Sequences`."""


class Piece(NamedTuple):
    """A response as tokens, or why it does not train."""

    name: str
    """The row's id and the number of the response, in messages."""
    ids: list[int]
    """The tokens; empty if it does not train."""
    start: int = 0
    """Index of the first token of the response."""
    changes: tuple[str, ...] = ()
    """What the template changed."""
    counted: tuple[str, ...] = ()
    """What is counted of it."""
    error: str = ""
    """Why it cannot be used."""


class Part(NamedTuple):
    """Some responses as tokens."""

    table: pa.Table
    """The sequences that train, with columns as in FEATURES."""
    facts: np.ndarray
    """[n] of FACTS, without groups."""
    content: bytes
    """What the hash of all tokens is made from."""
    ended: int
    """Sequences that end with the template's end token."""
    counts: Counter[str]
    """What is counted."""
    changes: list[tuple[str, tuple[str, ...]]]
    """(name, changes) of responses that the template changed."""
    errors: list[tuple[str, str]]
    """(name, why) of responses that cannot be used."""


@dataclass(frozen=True)
class Encoder:
    """Turns responses of rows into tokens."""

    rows: Rows
    chat: Chat
    max_length: int
    overlong: Overlong
    pairs: bool

    def __call__(self, chosen: tuple[np.ndarray, np.ndarray]) -> Part:
        """Return the responses with these indices of row [n] and response [n] as tokens."""
        rows, counts, kept, facts = self._read(chosen[0]), Counter[str](), list[Piece](), list[tuple[float, ...]]()
        changes, errors = list[tuple[str, tuple[str, ...]]](), list[tuple[str, str]]()
        units, size = list(zip(*(part.tolist() for part in chosen), strict=True)), 2 if self.pairs else 1
        for begin in range(0, len(units), size):
            unit = list[tuple[Piece, tuple[float, ...]]]()
            for index, k in units[begin : begin + size]:
                piece, response = self.encode(rows[index], k), rows[index].responses[k]
                counts.update(piece.counted)
                if piece.changes:
                    changes.append((piece.name, piece.changes))
                if piece.error:
                    errors.append((piece.name, piece.error))
                if piece.ids:
                    values = [math.nan if value is None else value for value in (response.score, response.weight)]
                    unit.append((piece, (index, k, piece.start, len(piece.ids) - piece.start, 0, *values)))
            if len(unit) < size:
                counts["sequences dropped with their pair"] += len(unit)
            elif self.pairs and unit[0][0].ids == unit[1][0].ids:
                counts["pairs skipped: both responses are the same tokens"] += 1
            else:
                kept += [piece for piece, _ in unit]
                facts += [values for _, values in unit]
        columns = {"ids": [piece.ids for piece in kept], "name": [piece.name for piece in kept]}
        content = "".join([repr((piece.start, piece.ids)) for piece in kept]).encode()
        ended = sum(piece.ids[-1] in self.chat.end_tokens for piece in kept)
        table = pa.table(columns, schema=FEATURES.arrow_schema)
        return Part(table, np.array(facts, dtype=FACTS), content, ended, counts, changes, errors)

    def _read(self, indices: np.ndarray) -> dict[int, Row]:
        """Return the rows at these indices by index."""
        distinct = np.unique(indices)
        return dict(zip(distinct.tolist(), self.rows.read(distinct), strict=True))

    def encode(self, row: Row, k: int) -> Piece:
        """Return a response of a row as tokens."""
        response = row.responses[k]
        name, counted = f"{row.id}#{k}", list[str]()
        try:
            encoded = self.chat.encode_response(row.prompt, response)
        except ValueError as error:
            return Piece(name, [], error=str(error))
        if encoded.changes:
            counted.append("sequences changed by the template")
        if encoded.control:
            counted.append("sequences with control tokens, encoded as text")
        if response.ids is not None and encoded.ids[encoded.start :] != list(response.ids):
            counted.append("sampled by another tokenizer, so read as text")
        ids, problem = [], ""
        try:
            ids = fit(encoded, self.max_length, self.overlong)
        except ValueError as error:
            counted.append(ERRORS)
            problem = str(error)
        else:
            full = encoded.start >= self.max_length  # no room for a response
            if not ids:
                counted.append("sequences whose prompt fills the limit" if full else "sequences dropped as overlong")
            elif len(ids) < len(encoded.ids):
                counted.append("sequences truncated")
        return Piece(name, ids, encoded.start, encoded.changes, tuple(counted), problem)


def encode_all(encoder: Encoder, choice: Choice) -> Iterator[Part]:
    """Yield the chosen responses as tokens, CHUNK at a time. Many are divided between processes."""
    begins = range(0, len(choice.row), CHUNK)
    chunks = ((choice.row[begin : begin + CHUNK], choice.response[begin : begin + CHUNK]) for begin in begins)
    return map_in_order(encoder, chunks, alone=len(begins) if len(choice.row) < PARALLEL else 0)


def fit(encoded: Encoded, max_length: int, overlong: Overlong) -> list[int]:
    """Return the tokens of a sequence that train and those of its prompt, or an empty list if it is dropped.

    A truncated response has no end token, so that it does not teach to stop. Raise a ValueError if the sequence is too
    long to be used.
    """
    if len(encoded.ids) <= max_length:
        return encoded.ids
    if overlong == "drop":
        return []
    full = encoded.start >= max_length  # no room for a response
    if overlong == "error" or full:
        what = f"its prompt alone has {encoded.start} tokens" if full else f"it has {len(encoded.ids)} tokens"
        raise ValueError(f"{what}; data.max_length={max_length}")
    return encoded.ids[:max_length]
