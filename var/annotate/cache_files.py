"""The files of a table of the annotation cache: how they are written, checked, searched, and merged.

A file holds one Arrow record batch of two columns, sorted by key: the content hash of an item and its value. It is
uncompressed, so that it can be memory-mapped, and its name is the SHA-256 of its bytes, so that damage is detected.

Small files are merged into larger ones, as in a log-structured merge tree. A file of at least LIMIT bytes is never
merged or removed. Processes map it and share it through the page cache. A smaller one may be merged by another machine
at any time, and on NFS a mapped file that another machine removes kills its readers. Therefore it is read into memory.
"""

import hashlib
import os
import platform
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LIMIT = 2**28  # bytes from which a file is mapped, and not merged any more
FANOUT = 8  # files of similar size that are merged into one

ARROW, PARQUET = ".arrow", ".parquet"  # earlier versions wrote Parquet

Keys = np.ndarray  # [n] of dtype S16, content hashes


class Damaged(Exception):
    """The bytes of a file do not match its name."""


class Foreign(Exception):
    """A complete file holds something else than the table's columns."""


def as_keys(hashes: Sequence[bytes]) -> Keys:
    """Return [n] content hashes as one array that sorts and searches fast."""
    return np.array(hashes, dtype="S16")


def sort_order(keys: Keys) -> np.ndarray:
    """Return [n] indices that sort the keys. Equal keys keep their order."""
    halves = np.ascontiguousarray(keys, dtype="S16").view(">u8").reshape(-1, 2)
    high = halves[:, 0].astype(np.uint64)
    order = np.argsort(high, kind="stable")  # several times as fast as to compare strings
    high = high[order]
    equal = np.flatnonzero(high[1:] == high[:-1])
    low = halves[:, 1]
    if (low[order[equal + 1]] < low[order[equal]]).any():
        return np.lexsort((low, halves[:, 0]))
    return order


def unique_keys(keys: Keys) -> tuple[Keys, np.ndarray, np.ndarray]:
    """Return the sorted distinct keys [u], the index of the first of each [u], and each key's place among them [n]."""
    order = sort_order(keys)
    ordered = keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    distinct, first = (ordered, order) if new.all() else (ordered[new], order[new])
    inverse = np.empty(len(keys), dtype=np.int64)
    inverse[order] = np.cumsum(new) - 1
    return distinct, first, inverse


def widen(kind: pa.DataType) -> pa.DataType:
    """Return the type with 64-bit offsets, since a column can exceed 2 GiB."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.large_list(widen(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, widen(field.type)) for field in kind])
    return kind


@dataclass(frozen=True)
class Shard:
    """A file that was read or mapped."""

    path: Path
    """The file."""
    size: int
    """Its bytes."""
    keys: Keys
    """[m] sorted and distinct."""
    values: pa.Array
    """[m] in the order of the keys."""

    @property
    def is_small(self) -> bool:
        """Whether the file can still be merged."""
        return self.size < LIMIT or self.path.suffix == PARQUET

    def match(self, wanted: Keys) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in `wanted` of the items that the file has, and their rows in the file.

        wanted: sorted and distinct.
        """
        few, many = (self.keys, wanted) if len(self.keys) < len(wanted) else (wanted, self.keys)
        if not len(few):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        at = np.searchsorted(many, few).clip(max=len(many) - 1)
        hit = np.flatnonzero(many[at] == few)
        return (at[hit], hit) if few is self.keys else (hit, at[hit])


def encode(keys: Keys, values: pa.Array) -> tuple[str, pa.Buffer]:
    """Return the name and the bytes of a file. keys: sorted and distinct."""
    hashes = pa.Array.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))])
    # So that two machines that compute the same items notice each other, their files never have the same name.
    schema = pa.schema({"key": hashes.type, "value": values.type}, metadata={"machine": platform.node()})
    batch = pa.record_batch([hashes, values], schema=schema)
    size = pa.MockOutputStream()  # so that the buffer need not grow, which would take twice its memory
    with pa.ipc.new_file(size, batch.schema) as writer:
        writer.write_batch(batch)
    data = pa.allocate_buffer(size.size())
    with pa.FixedSizeBufferWriter(data) as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return f"{hashlib.sha256(data).hexdigest()[:32]}{ARROW}", data


def load(path: Path, value: pa.DataType) -> Shard:
    """Read or map a file, and check all of its bytes.

    Raise Damaged if they do not match its name, Foreign if they are another table's, and OSError.

    Args:
        path: the file.
        value: the type of the table's values.
    """
    size = path.stat().st_size
    if size >= LIMIT and path.suffix == ARROW:
        data = pa.memory_map(str(path)).read_buffer()
        with path.open("rb") as file:  # pages of the map would count as this process's memory
            digest = hashlib.file_digest(file, "sha256")
    else:
        data = pa.py_buffer(path.read_bytes())
        digest = hashlib.sha256(data)
    if digest.hexdigest()[:32] != path.stem:
        raise Damaged(path)
    try:
        table = pa.ipc.open_file(data).read_all() if path.suffix == ARROW else pq.read_table(pa.BufferReader(data))
        table.validate(full=True)
        expected = pa.schema({"key": pa.binary(16), "value": widen(value) if path.suffix == ARROW else value})
        if not table.schema.equals(expected) or any(column.null_count for column in table.columns):
            raise Foreign(f"holds {', '.join(f'{field.name}: {field.type}' for field in table.schema)}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a column's name may be any bytes
        raise Foreign(f"is not {'Arrow' if path.suffix == ARROW else 'Parquet'} ({str(error)[:80]})") from error
    keys, values = _keys_of(table["key"]), _join([chunk.cast(widen(value)) for chunk in table["value"].chunks], value)
    if path.suffix == PARQUET:
        keys, first, _ = unique_keys(keys)
        values = values.take(pa.array(first))
    elif not (keys[:-1] < keys[1:]).all():
        raise Foreign("holds keys that are not sorted")
    return Shard(path, size if path.suffix == ARROW else values.nbytes + keys.nbytes, keys, values)


def _join(chunks: list[pa.Array], value: pa.DataType) -> pa.Array:
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays([pa.array([], widen(value)), *chunks])  # copies


def _keys_of(column: pa.ChunkedArray) -> Keys:
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype="S16", count=len(chunk), offset=16 * chunk.offset)
        for chunk in column.chunks
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([as_keys([]), *parts])


def merge(shards: Sequence[Shard]) -> tuple[Keys, pa.Array]:
    """Return all items of the files, sorted by key and without duplicates."""
    keys = np.concatenate([shard.keys for shard in shards])
    values = pa.concat_arrays([shard.values for shard in shards])
    order = sort_order(keys)
    keys = keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = keys[1:] != keys[:-1]
    first = np.flatnonzero(new)
    rows, place = order[first], np.cumsum(new) - 1
    copy = np.arange(len(keys)) - first[place]  # 0 for the first of equal keys
    for number in range(1, copy.max(initial=0) + 1):
        at = np.flatnonzero(copy == number)
        at = at[replaces(values, rows[place[at]], values, order[at])]
        rows[place[at]] = order[at]
    return keys[first], values.take(pa.array(rows))


def replaces(first: pa.Array, rows: np.ndarray, second: pa.Array, others: np.ndarray) -> np.ndarray:
    """Return [n] bool: of two values of one item, whether the second is the one that all processes read.

    Two machines that compute an item at once can round it differently. The rule depends on the values alone, so that it
    gives the same result before and after a merge.

    Args:
        first: values.
        rows: [n] the rows of `first`.
        second: values.
        others: [n] the rows of `second`.
    """
    result = np.zeros(len(rows), dtype=bool)
    for begin in range(0, len(rows), 4096):
        part = slice(begin, begin + 4096)
        ours, theirs = first.take(pa.array(rows[part])), second.take(pa.array(others[part]))
        if not ours.equals(theirs):
            pairs = zip(ours.to_pylist(), theirs.to_pylist(), strict=True)
            result[part] = [repr(other) < repr(one) for one, other in pairs]
    return result


def is_full(shards: Collection[Shard]) -> bool:
    """Return whether the files are large enough to become one that is not merged any more."""
    return sum(shard.size for shard in shards) >= LIMIT


def choose(shards: Collection[Shard]) -> list[Shard]:
    """Return the small files to merge now: FANOUT of similar size with all smaller ones, or all that reach LIMIT.

    So an item is written again once per factor FANOUT in size, and there are at most FANOUT files per factor.
    """
    small = [shard for shard in shards if shard.is_small]
    if is_full(small) and len(small) > 1:
        return small
    tiers = defaultdict[int, list[Shard]](list)
    for shard in small:
        tiers[shard.size.bit_length() // (FANOUT.bit_length() - 1)].append(shard)
    full = max((tier for tier, members in tiers.items() if len(members) >= FANOUT), default=-1)
    return [shard for tier, members in tiers.items() if tier <= full for shard in members]


def sync_folder(folder: Path) -> None:
    """Make the names of new files durable, before others are removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems do not support it
        os.fsync(descriptor)
    os.close(descriptor)
