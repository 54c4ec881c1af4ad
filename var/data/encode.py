"""Responses of rows as tokens, by several processes if they are many."""

import math
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from var.data.chat import Chat, Encoded
from var.data.rows import Rows
from var.data.settings import Overlong
from var.utils.signals import end_with_parent

CHUNK = 1000  # responses that are tokenized together; even, so that pairs stay together
PARALLEL = 20_000  # responses from which on several processes tokenize: each takes some seconds to start
MOST_PROCESSES = 16
ERRORS = "sequences that are errors"


class Piece(NamedTuple):
    """A response as tokens, or why it does not train."""

    name: str
    """The row's id and the number of the response, in messages."""
    ids: list[int]
    """The tokens; empty if it does not train."""
    start: int = 0
    """Index of the first token of the response."""
    numbers: tuple[float, float] = (math.nan, math.nan)
    """The data set's own score and weight."""
    changes: tuple[str, ...] = ()
    """What the template changed."""
    counted: tuple[str, ...] = ()
    """What is counted of it."""
    error: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True)
class Encoder:
    """Turns responses of rows into tokens, in this process or in others."""

    rows: Rows
    chat: Chat
    max_length: int
    overlong: Overlong

    def __call__(self, chosen: Sequence[tuple[int, int]]) -> list[Piece]:
        """Return the responses with these indices of row and response as tokens."""
        return [self.encode(index, k) for index, k in chosen]

    def encode(self, index: int, k: int) -> Piece:
        """Return a response as tokens."""
        row, response = self.rows[index], self.rows[index].responses[k]
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
        numbers = tuple(math.nan if value is None else value for value in (response.score, response.weight))
        return Piece(name, ids, encoded.start, numbers, encoded.changes, tuple(counted), problem)  # type: ignore[arg-type]


def encode_all(encoder: Encoder, chosen: list[tuple[int, int]]) -> Iterator[list[Piece]]:
    """Yield the pieces of CHUNK responses at a time, in order. Many responses are divided between processes.

    The processes are forked, as those of `datasets`, so they start at once. They read the rows from the same memory.
    """
    chunks = [chosen[begin : begin + CHUNK] for begin in range(0, len(chosen), CHUNK)]
    processes = min(count_cpus(), len(chunks), MOST_PROCESSES)
    if len(chosen) < PARALLEL or processes < 2 or sys.platform != "linux":
        yield from map(encoder, chunks)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start, (encoder,)) as pool:
        pending = deque[Future[list[Piece]]]()
        for chunk in chunks:
            pending.append(pool.submit(_encode, chunk))
            if len(pending) > 2 * processes:  # the others wait for the one that writes
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _start(encoder: Encoder) -> None:
    """Prepare a process of the pool. It must not outlive the one that writes, whose locks it would keep."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)
    _encoder.append(encoder)


def _encode(chunk: Sequence[tuple[int, int]]) -> list[Piece]:
    return _encoder[0](chunk)


_encoder: list[Encoder] = []
"""That of a process of the pool."""


def count_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
