"""The annotation cache: numbers that do not depend on θ, computed once and found again by their content.

annotations/<kind>/<key>/ is a table. It holds `fingerprint.json` (what the numbers depend on; its hash is the key) and
shards `<sha256>.parquet` of two columns: an item's content hash and its value. An item is a prompt, or a prompt with a
response. It does not depend on the plan, so another shuffle, B or subset of the rows finds it. An 8×8 annotation holds
every 4×4 and 2×2 of the same plan.

Several ranks and jobs can fill one table at once, also on a network file system. There is no lock, so none can be
broken or left behind. A shard is written completely to a `.partial` file of its own, synced, closed, and renamed to the
hash of its bytes. So two writers never share a file, an interrupted one leaves only complete shards, and damage is
detected. At worst a race computes an item twice; then every process reads it from the shard whose name sorts first. NFS
can show changes late: a shard that is listed but not there is looked for again, and `read` waits up to a minute for one
that is not listed yet. Nobody reads a `.partial` file. Whoever fills the table removes those older than a day and
reports it.
"""

import errno
import hashlib
import heapq
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from var.utils.errors import UserError
from var.utils.files import atomic
from var.utils.provenance import hash_content

FORMAT = 1  # incremented when the same fingerprint no longer gives the same numbers


FINGERPRINT = "fingerprint.json"


STALE = 60.0  # seconds for which an NFS client may show a folder as it was (acdirmax)


ABANDONED = 86_400.0  # seconds after which nobody is still writing a shard


Keys = np.ndarray  # [n] of dtype S16, content hashes


def as_keys(hashes: Sequence[bytes]) -> Keys:
    """Return [n] content hashes as one array that sorts and searches fast."""
    return np.array(hashes, dtype="S16")


def widen(kind: pa.DataType) -> pa.DataType:
    """Return the type with 64-bit offsets. In memory a table is one array, which can exceed 2 GiB."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.large_list(widen(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, widen(field.type)) for field in kind])
    return kind


class AnnotationCache:
    """A folder of tables, one for each kind and fingerprint."""

    def __init__(self, root: str | Path, warn: Callable[[str], None] = print) -> None:
        self.root, self.warn = Path(root), warn

    def table(self, kind: str, fingerprint: Mapping[str, Any], value: pa.DataType) -> "CacheTable":
        """Return the table of `kind` for numbers that depend only on `fingerprint` (JSON values) and on the item."""
        fingerprint = {"format": FORMAT, "kind": kind, **fingerprint}
        return CacheTable(self.root / kind / hash_content(fingerprint).hex()[:16], fingerprint, value, self.warn)


class CacheTable:
    """Items of one kind and fingerprint."""

    def __init__(
        self, path: Path, fingerprint: Mapping[str, Any], value: pa.DataType, warn: Callable[[str], None]
    ) -> None:
        self.path, self.fingerprint, self.value, self.warn = path, fingerprint, value, warn
        self._held = widen(value)
        self._schema = pa.schema({"key": pa.binary(16), "value": value})
        self._own = False  # whether fingerprint.json was seen to be this table's
        self._known: set[str] = set()  # files that have been read, or need not be read again
        self._names: list[str] = []  # of the shards that have been read, in that order
        self._shard = np.array([], dtype=np.int64)  # [n] the shard that holds each item
        self._keys = as_keys([])
        self._values = pa.array([], type=self._held)
        self._order = np.array([], dtype=np.int64)

    def __len__(self) -> int:
        self.refresh()
        return len(self._keys)

    def refresh(self) -> None:
        """Read new shards. Damaged ones are moved away and ones of another form are ignored.

        Both are reported, and their items count as missing.
        """
        fresh = [name for name in self._listed() if name not in self._known]
        tables = {name: table for name in fresh if (table := self._load(self.path / name)) is not None}
        if not tables:
            return
        self._known |= set(tables)  # not damaged ones: computed again they can have the same name
        keys = [self._keys, *(as_keys(table["key"].to_pylist()) for table in tables.values())]
        chunks = (chunk for table in tables.values() for chunk in table["value"].chunks)
        values = [self._values, *(chunk.cast(self._held) for chunk in chunks)]
        numbers = np.arange(len(self._names), len(self._names) + len(tables))
        self._names += tables
        self._shard = np.concatenate([self._shard, np.repeat(numbers, [len(table) for table in tables.values()])])
        self._keys, self._values = np.concatenate(keys), pa.concat_arrays(values)
        place = np.argsort(np.argsort(self._names))
        # By name, not in the order of reading, which differs between processes.
        self._order = np.lexsort((place[self._shard], self._keys))

    def _listed(self) -> list[str]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:  # nothing is written yet
            return []
        except OSError as error:
            raise UserError(
                f"annotation_cache: cannot be read: {error.strerror} at {self.path}. Set another folder."
            ) from error
        self._is_own()
        return sorted(name for name in names if name.endswith(".parquet"))

    def _is_own(self) -> bool:
        """Return whether fingerprint.json is this table's. Raise UserError if it is another table's."""
        file = self.path / FINGERPRINT
        if self._own or file.name in self._known:
            return self._own
        try:
            found = json.loads(file.read_bytes())
        except OSError:  # it does not exist yet
            return False
        except ValueError:
            self._known.add(file.name)
            self.warn(f"annotation cache: {file} is damaged. The next shard that is written here restores it.")
            return False
        if hash_content(found) != hash_content(json.loads(json.dumps(self.fingerprint))):
            raise UserError(
                f"{file} does not match the name of its folder: it was copied or edited, so it is unknown what the "
                "numbers next to it depend on. Move the folder out of the annotation cache, or restore the file."
            )
        self._own = True
        return True

    def _load(self, path: Path) -> pa.Table | None:
        aside = path.with_suffix(".damaged")
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest()[:32] != path.stem:
                path.replace(aside)
                self.warn(
                    f"annotation cache: checksum mismatch in {path}. It was moved to {aside.name} and its items will "
                    "be recomputed."
                )
                return None
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # these: another process moved it, or NFS is late
                self._known.add(path.name)
                self.warn(
                    f"annotation cache: {path} cannot be read or moved ({error.strerror}). Its items count as missing."
                )
            return None
        try:
            table = pq.read_table(pa.BufferReader(data))
            if table.schema.equals(self._schema) and not any(column.null_count for column in table.columns):
                return table
            found = f"holds {', '.join(f'{field.name}: {field.type}' for field in table.schema)}"
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a column's name may be any bytes
            found = f"is not Parquet ({str(error)[:80]})"
        self._known.add(path.name)
        self.warn(
            f"annotation cache: {path} {found}, expected key: {self._schema.types[0]} and value: {self.value} without "
            "nulls. It is ignored and its items will be recomputed."
        )
        return None

    def missing(self, keys: Keys) -> np.ndarray:
        """Return [n] bool: which items are missing."""
        self.refresh()
        return self._find(keys) < 0

    def read(self, keys: Keys) -> pa.Array:
        """Return the values of `keys`, in their order. Raise KeyError if some are still missing after STALE seconds."""
        until = time.monotonic() + STALE
        while (absent := int(self.missing(keys).sum())) and time.monotonic() < until:
            time.sleep(0.5)
        if absent:
            raise KeyError(f"{absent} of {len(keys)} items are not in {self.path}")
        return self._values.take(pa.array(self._find(keys)))

    def _find(self, keys: Keys) -> np.ndarray:
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self._keys, keys, sorter=self._order).clip(max=len(self._keys) - 1)
        found = self._order[at]
        return np.where(self._keys[found] == keys, found, -1)

    def write(self, keys: Keys, values: Any) -> None:
        """Add one shard, completely or not at all."""
        column = values.cast(self.value) if isinstance(values, pa.Array) else pa.array(values, type=self.value)
        # numpy drops trailing zero bytes of an S16; tobytes keeps all 16
        hashes = pa.array([keys[i : i + 1].tobytes() for i in range(len(keys))], type=pa.binary(16))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"key": hashes, "value": column}), sink)
        data = sink.getvalue().to_pybytes()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._is_own() or not (self.path / FINGERPRINT).exists():  # the folder may have been removed
                text = json.dumps(self.fingerprint, indent=1, ensure_ascii=False)
                with atomic(self.path / FINGERPRINT, "wb", shared=True) as file:
                    file.write(text.encode("utf-8", "surrogatepass"))  # as it is hashed
                self._known.discard(FINGERPRINT)
            with atomic(self.path / f"{hashlib.sha256(data).hexdigest()[:32]}.parquet", "wb", shared=True) as file:
                file.write(data)
        except OSError as error:
            reason = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EROFS: "read-only"}
            raise UserError(
                f"annotation_cache: cannot be written: {reason.get(error.errno or 0, error.strerror)} at {self.path}. "
                "Earlier annotations are kept. Free disk space or set another folder, and run the same command again."
            ) from error

    def _sweep(self) -> None:
        """Remove incomplete files of killed writers."""
        gone = 0
        for partial in list(self.path.glob("*.partial")):
            with suppress(OSError):  # another process removes it, or we may not
                if time.time() - partial.stat().st_mtime > ABANDONED:
                    partial.unlink()
                    gone += 1
        if gone:
            self.warn(f"annotation cache: incomplete files of killed runs, removed from {self.path}: {gone}")

    def fill(
        self,
        keys: Keys,
        compute: Callable[[np.ndarray, Callable[[int], None]], Any],
        shard: int,
        rank: int = 0,
        world: int = 1,
        advance: Callable[[int], None] = lambda done: None,
        part: np.ndarray | None = None,
        cost: np.ndarray | None = None,
    ) -> int:
        """Compute and write this rank's share of the missing items. Return how many this rank computed.

        Args:
            keys: [n] the items.
            compute: compute(indices, advance) returns the values of keys[indices] and calls advance(done) meanwhile.
            shard: items per file.
            rank: of this process.
            world: the number of processes.
            advance: called with the number of items that are done.
            part: [n] int, items with equal labels are computed by one rank, one after another. None: each by itself.
            cost: [n] the work of each item, by which ranks are balanced. None: 1.
        """
        self._sweep()
        mine = deal(keys, rank, world, part, cost)
        todo = mine[self.missing(keys[mine])]
        computed = 0
        for begin in range(0, len(todo), shard):
            indices = todo[begin : begin + shard]
            fresh = indices[self.missing(keys[indices])]  # another job may have written some
            advance(len(indices) - len(fresh))
            if len(fresh):
                self.write(keys[fresh], compute(fresh, advance))
                computed += len(fresh)
        return computed


def deal(
    keys: Keys, rank: int, world: int, part: np.ndarray | None = None, cost: np.ndarray | None = None
) -> np.ndarray:
    """Return the indices of the items that one rank computes: complete parts, in the order in which they begin.

    The most expensive part is dealt first, each to the rank with the least work so far. All items are dealt, not only
    missing ones: ranks must agree, and see missing ones at different times.

    Args:
        keys: [n] the items. Of equal ones, only the first counts.
        rank: of the process.
        world: the number of processes.
        part: [n] int, the label of each item's part. None: each item is a part.
        cost: [n] the work of each item. None: 1.
    """
    items = np.sort(np.unique(keys, return_index=True)[1])
    part = items if part is None else part[items]
    _, first, place = np.unique(part, return_index=True, return_inverse=True)
    total = np.bincount(place, weights=None if cost is None else cost[items], minlength=len(first))
    owner = np.zeros(len(first), dtype=np.int64)
    loads = [(0.0, other) for other in range(world)]
    for label in np.lexsort((first, -total)) if world > 1 else ():
        load, owner[label] = loads[0]
        heapq.heapreplace(loads, (load + float(total[label]), int(owner[label])))
    mine = np.flatnonzero(owner[place] == rank)
    return items[mine[np.argsort(first[place[mine]], kind="stable")]]
