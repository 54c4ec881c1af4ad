"""Values that were read from the annotation cache and stay in its files."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from var.annotate.cache_files import Keys, Shard, replaces, unique_keys

CHUNK = 4096  # values in memory at once


class Column(Sequence[Any]):
    """Values of n items, in the order of the keys that were read. Large files are mapped, so ranks share the pages."""

    def __init__(self, shards: Sequence[Shard], shard: np.ndarray, row: np.ndarray, kind: pa.DataType) -> None:
        """Refer to values.

        Args:
            shards: the files.
            shard: [n] int, the file that holds each value.
            row: [n] int, its row in this file.
            kind: the type of a value.
        """
        self.type = kind
        self._shards, self._shard, self._row = shards, shard, row

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: Any) -> Any:
        """Return a value as an Arrow scalar, or a Column for a slice."""
        if isinstance(index, slice):
            return Column(self._shards, self._shard[index], self._row[index], self.type)
        return self._shards[self._shard[index]].values[int(self._row[index])]

    def take(self, indices: np.ndarray) -> pa.Array:
        """Return a copy of the values at `indices`."""
        shard, row = self._shard[indices], self._row[indices]
        order = np.argsort(shard, kind="stable")
        numbers, first = np.unique(shard[order], return_index=True)
        rows = np.split(row[order], first[1:])
        parts = [self._shards[i].values.take(pa.array(some)) for i, some in zip(numbers, rows, strict=False)]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_arrays([pa.array([], self.type), *parts]).take(pa.array(back))

    def chunks(self) -> Iterator[pa.Array]:
        """Yield copies of all values in order, at most CHUNK at a time."""
        for begin in range(0, len(self), CHUNK):
            yield self.take(np.arange(begin, min(begin + CHUNK, len(self))))

    def __iter__(self) -> Iterator[Any]:
        """Yield all values as Python objects."""
        for chunk in self.chunks():
            yield from chunk.to_pylist()

    def to_pylist(self) -> list[Any]:
        """Return all values as Python objects."""
        return list(self)

    def to_numpy(self) -> np.ndarray:
        """Return numbers as [n], and lists of k numbers each as [n, k]."""
        nested = pa.types.is_large_list(self.type)
        dtype = (self.type.value_type if nested else self.type).to_pandas_dtype()
        chunks = [(chunk.flatten() if nested else chunk).to_numpy(zero_copy_only=False) for chunk in self.chunks()]
        numbers = np.concatenate([np.zeros(0, dtype), *chunks])
        return numbers.reshape(len(self), -1) if nested and len(self) else numbers


def join(columns: Sequence[Column]) -> Column:
    """Return the values of all columns, in order."""
    if len(columns) == 1:
        return columns[0]
    shards, numbers = list[Shard](), list[np.ndarray]()
    for column in columns:
        numbers.append(column._shard + np.int32(len(shards)))
        shards += column._shards
    return Column(shards, np.concatenate(numbers), np.concatenate([c._row for c in columns]), columns[0].type)


def locate(keys: Keys, shards: Sequence[Shard], kind: pa.DataType) -> Column:
    """Return the values of `keys`, all of which are in the files. If two values of an item differ, see `replaces`."""
    wanted, _, place = unique_keys(keys)
    shard, row = np.full(len(wanted), -1, dtype=np.int32), np.zeros(len(wanted), dtype=np.int64)
    for number, candidate in enumerate(shards):
        at, rows = candidate.match(wanted)
        keep = shard[at] < 0
        for earlier in np.unique(shard[at[~keep]]):
            same = np.flatnonzero(shard[at] == earlier)
            keep[same] = replaces(shards[earlier].values, row[at[same]], candidate.values, rows[same])
        shard[at[keep]], row[at[keep]] = number, rows[keep]
    return Column(shards, shard[place], row[place], kind)
