"""The annotation cache in tests: a table of squares, and what fills it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from var.annotate.cache import AnnotationCache, CacheTable
from var.annotate.cache_files import as_keys
from var.utils.provenance import hash_content

FINGERPRINT = {"weights": "a"}


def keys(*items: int) -> np.ndarray:
    """Return the keys of integers."""
    return as_keys([hash_content(item) for item in items])


def open_table(
    root: Path, fingerprint: dict[str, Any] = FINGERPRINT, warn: Callable[[str], None] = print
) -> CacheTable:
    """Open the table afresh, as another process would."""
    return AnnotationCache(root, warn).table("rewards", fingerprint, pa.float64())


def squares(items: Iterable[int], seen: list[int]) -> Callable[..., list[float]]:
    """Return a function that computes the squares of items and appends them to `seen`."""
    items = list(items)

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        seen.extend(items[i] for i in indices)
        advance(len(indices))
        return [float(items[i] ** 2) for i in indices]

    return compute


def fill(table: CacheTable, items: Iterable[int], shard: int = 2, **ranks: int) -> list[int]:
    """Fill the table with the squares of items; return the items that were computed."""
    items, seen = list(items), list[int]()
    assert table.fill(keys(*items), squares(items, seen), shard, **ranks) == len(seen)
    return seen


def values(table: CacheTable, items: Iterable[int]) -> list[float]:
    """Read the values of items."""
    return table.read(keys(*items)).to_pylist()  # type: ignore[no-any-return]


def shards(table: CacheTable) -> list[Path]:
    """Return the files of the table, by name."""
    return sorted(table.path.glob("*.arrow"))


def read_shard(path: Path) -> pa.Table:
    """Read a file of a table, without checks."""
    return pa.ipc.open_file(path.read_bytes()).read_all()


def flip(data: bytes) -> bytes:
    """Return data with one bit changed."""
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]
