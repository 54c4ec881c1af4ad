"""Content hashes of items: of prompts and responses as tokens, of all pairs in micro-batches, and of texts.

They equal `hash_content` of the same values. Texts and tokens are read a chunk at a time. What pairs have in common is
written and hashed once.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from var.annotate.cache_files import Keys
from var.data.messages import prompt_content, texts_in
from var.data.sequences import Sequences
from var.data.stored import remember
from var.rewards.base import Triple
from var.utils.provenance import dump

CHUNK = 4096  # items in memory at once


def hash_sequences(sequences: Sequences, cache: Path) -> Keys:
    """Return [n] hashes of each prompt with its response."""

    def compute() -> Keys:
        everything = np.arange(len(sequences))
        return _collect(_finish(_begin(prompt), text) for prompt, text in _write_tokens(sequences, everything))

    return _remember(cache, sequences.key, compute)


def hash_prompts(sequences: Sequences, indices: np.ndarray) -> Keys:
    """Return [m] hashes of the prompts of the sequences at `indices`, with an empty response."""
    return _collect(_finish(_begin(prompt), "") for prompt, _ in _write_tokens(sequences, indices))


def hash_pairs(sequences: Sequences, pairs: np.ndarray, cache: Path) -> Keys:
    """Return [P] hashes of the prompt of sequence i with the response of sequence j, for pairs (i, j) [P, 2]."""

    def digests() -> Iterator[bytes]:
        for begin in range(0, len(pairs), CHUNK):
            some = pairs[begin : begin + CHUNK]
            indices, place = np.unique(some, return_inverse=True)
            prompts, responses = zip(*_write_tokens(sequences, indices), strict=True)
            asked = [_begin(prompt) for prompt in prompts]
            for i, j in place.reshape(-1, 2).tolist():
                yield _finish(asked[i], responses[j])

    which = hashlib.sha256(np.ascontiguousarray(pairs).data).hexdigest()[:32]
    return _remember(cache, sequences.key and f"{sequences.key}-{which}", lambda: _collect(digests()))


def hash_texts(triples: Sequence[Triple], cache: Path) -> tuple[Keys, np.ndarray]:
    """Return [n] hashes of (prompt, response, answer), and the number of characters that each has."""
    found = _remember(cache, getattr(triples, "key", ""), lambda: _hash_texts(triples))
    return found["key"], found["length"]


def _hash_texts(triples: Sequence[Triple]) -> np.ndarray:
    """Return [n] records of hashes and lengths."""
    lengths = np.zeros(len(triples), dtype=np.int64)

    def digests() -> Iterator[bytes]:
        asked: Any = None
        for n, (prompt, text, answer) in enumerate(triples):
            if asked is not prompt:  # pairs with one prompt follow each other
                asked, size = prompt, sum(map(len, texts_in(list(prompt))))
                prefix = hashlib.sha256(b"[" + dump(prompt_content(prompt)))
            lengths[n] = len(text) + size
            digest = prefix.copy()
            digest.update(b"," + dump(text) + b"," + dump(answer) + b"]")
            yield digest.digest()[:16]

    found = np.empty(len(triples), dtype=[("key", "S16"), ("length", "i8")])
    found["key"], found["length"] = _collect(digests()), lengths
    return found


def _remember(cache: Path, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return an array that is computed once. With an empty key, it is computed each time."""
    return remember(cache / "keys" / key, "computes the same keys", compute) if key else compute()


def _write_tokens(sequences: Sequences, indices: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield the tokens of each prompt and of its response as numbers between commas."""
    table = sequences.table.select_columns(["ids"]).with_format("arrow")
    for begin in range(0, len(indices), CHUNK):
        part: pa.Table = table[indices[begin : begin + CHUNK].tolist()]
        ids = pa.concat_arrays(part["ids"].chunks)
        offsets = np.zeros(2 * len(ids) + 1, dtype=np.int32)
        offsets[2::2] = np.cumsum(ids.value_lengths())
        offsets[1::2] = offsets[:-1:2] + sequences.start[indices[begin : begin + CHUNK]]
        halves = pa.ListArray.from_arrays(pa.array(offsets), ids.flatten().cast(pa.string()))
        texts = pc.binary_join(halves, ",").to_pylist()
        yield from zip(texts[::2], texts[1::2], strict=True)


def _begin(prompt: str) -> Any:
    return hashlib.sha256(f"[[{prompt}],[".encode())


def _finish(prompt: Any, response: str) -> bytes:
    digest = prompt.copy()
    digest.update(f"{response}]]".encode())
    return digest.digest()[:16]  # type: ignore[no-any-return]


def _collect(digests: Iterator[bytes]) -> Keys:
    return np.frombuffer(b"".join(digests), dtype="S16")
