"""The store: numbers that do not depend on θ, computed once, found again by their content.

annotations/<kind>/<key>/ holds `identity.json` (what the numbers depend on; its hash is the key) and shards
`<sha256>.parquet` of two columns: the item's content hash and its value. An item is a prompt or a prompt with a
response, whatever the plan, so that another shuffle, B or subset of the rows finds what is there; an 8×8 annotation
holds every 4×4 and 2×2 of the same plan.

Ranks and jobs fill one store at once, on a network's file system too, and there is no lock that one could break or
leave behind. A shard is written whole to a `.partial` of its own, synced, closed, and renamed to the hash of its bytes:
two writers never share a file, a killed one leaves whole shards, and a damaged shard betrays itself. The worst that a
race costs is an item computed twice; of an item held twice every process takes the shard whose name comes first. What
NFS shows late does no harm: a shard that is listed and not there is looked for again, and `read` waits a minute for one
that is there and not listed. Nobody reads a `.partial`; whoever fills the shelf removes those older than a day, and
says so.
"""

import errno
import hashlib
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

FORMAT = 1  # raised when the same identity would no longer give the same numbers


IDENTITY = "identity.json"


STALE = 60.0  # seconds for which an NFS client may show a folder as it was (acdirmax)


ABANDONED = 86_400.0  # seconds after which nobody is still writing a shard


Keys = np.ndarray  # [n] of dtype S16, content hashes


def as_keys(hashes: Sequence[bytes]) -> Keys:
    """[n] content hashes as one array that sorts and searches fast."""
    return np.array(hashes, dtype="S16")


def large(kind: pa.DataType) -> pa.DataType:
    """The same type with offsets of 64 bits: in memory all of a shelf is one array, and may have more than 2 GiB."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.large_list(large(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, large(field.type)) for field in kind])
    return kind


class AnnotationCache:
    """A folder of shelves, one for each kind and identity."""

    def __init__(self, root: str | Path, warn: Callable[[str], None] = print) -> None:
        self.root, self.warn = Path(root), warn

    def shelf(self, kind: str, identity: Mapping[str, Any], value: pa.DataType) -> "CacheTable":
        """The shelf of `kind` for numbers that depend on `identity` (JSON values) and on the item alone."""
        identity = {"format": FORMAT, "kind": kind, **identity}
        return CacheTable(self.root / kind / hash_content(identity).hex()[:16], identity, value, self.warn)


class CacheTable:
    """Items of one kind and identity: `missing`, `read`, `write`, `fill`."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], value: pa.DataType, warn: Callable[[str], None]
    ) -> None:
        self.path, self.identity, self.value, self.warn = path, identity, value, warn
        self._held = large(value)
        self._schema = pa.schema({"key": pa.binary(16), "value": value})
        self._own = False  # identity.json was seen to be this shelf's
        self._known: set[str] = set()  # files that are read, or need no second look
        self._names: list[str] = []  # of the shards that are read, as they came
        self._shard = np.array([], dtype=np.int64)  # [n] which of them holds an item
        self._keys = as_keys([])
        self._values = pa.array([], type=self._held)
        self._order = np.array([], dtype=np.int64)

    def __len__(self) -> int:
        self.refresh()
        return len(self._keys)

    def refresh(self) -> None:
        """Read shards written since the last look. A damaged one is set aside, one of another form is left alone; both
        are reported, and their items are missing."""
        fresh = [name for name in self._listed() if name not in self._known]
        tables = {name: table for name in fresh if (table := self._load(self.path / name)) is not None}
        if not tables:
            return
        self._known |= set(tables)  # a damaged one is not: computed again it may have the same bytes, hence its name
        keys = [self._keys, *(as_keys(table["key"].to_pylist()) for table in tables.values())]
        chunks = (chunk for table in tables.values() for chunk in table["value"].chunks)
        values = [self._values, *(chunk.cast(self._held) for chunk in chunks)]
        numbers = np.arange(len(self._names), len(self._names) + len(tables))
        self._names += tables
        self._shard = np.concatenate([self._shard, np.repeat(numbers, [len(table) for table in tables.values()])])
        self._keys, self._values = np.concatenate(keys), pa.concat_arrays(values)
        place = np.argsort(np.argsort(self._names))
        self._order = np.lexsort((place[self._shard], self._keys))  # not as they came: processes come at other times

    def _listed(self) -> list[str]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:  # nothing is written yet
            return []
        except OSError as error:
            raise UserError(
                f"the store cannot be read: {error.strerror} at {self.path}; set store= to another folder"
            ) from error
        self._identified()
        return sorted(name for name in names if name.endswith(".parquet"))

    def _identified(self) -> bool:
        """Whether identity.json says what this shelf is; a UserError where it says something else."""
        file = self.path / IDENTITY
        if self._own or file.name in self._known:
            return self._own
        try:
            found = json.loads(file.read_bytes())
        except OSError:  # not there yet
            return False
        except ValueError:
            self._known.add(file.name)
            self.warn(f"store: {file} is damaged; the next shard that is written here brings it back")
            return False
        if hash_content(found) != hash_content(json.loads(json.dumps(self.identity))):
            raise UserError(
                f"{file} says something else than the name of its folder: it was copied or edited, so what the numbers "
                "beside it depend on is not known. Move the folder out of the store, or put the file back"
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
                    f"store: the checksum of {path} is off; set aside as {aside.name}, its items are computed again"
                )
                return None
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # else another process has set it aside, or NFS is late
                self._known.add(path.name)
                self.warn(f"store: {path} cannot be used or set aside ({error.strerror}); its items count as missing")
            return None
        try:
            table = pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            found = f"is no Parquet ({str(error)[:80]})"
        else:
            if table.schema.equals(self._schema) and not any(column.null_count for column in table.columns):
                return table
            found = f"holds {', '.join(f'{field.name}: {field.type}' for field in table.schema)}"
        self._known.add(path.name)
        self.warn(
            f"store: {path} {found}, where key: {self._schema.types[0]} and value: {self.value} without gaps belong; "
            "it is left as it is, and its items are computed again"
        )
        return None

    def missing(self, keys: Keys) -> np.ndarray:
        """[n] bool: which items are not held."""
        self.refresh()
        return self._find(keys) < 0

    def read(self, keys: Keys) -> pa.Array:
        """The values of `keys`, in their order. KeyError counts what is missing, and stays so for STALE seconds."""
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
        """Add one shard, whole or not at all."""
        column = values.cast(self.value) if isinstance(values, pa.Array) else pa.array(values, type=self.value)
        # numpy cuts trailing zero bytes off an S16; tobytes keeps all 16
        hashes = pa.array([keys[i : i + 1].tobytes() for i in range(len(keys))], type=pa.binary(16))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"key": hashes, "value": column}), sink)
        data = sink.getvalue().to_pybytes()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._identified() or not (self.path / IDENTITY).exists():  # the folder may have been removed
                text = json.dumps(self.identity, indent=1, ensure_ascii=False)
                with atomic(self.path / IDENTITY, "wb", shared=True) as file:
                    file.write(text.encode("utf-8", "surrogatepass"))  # as it is hashed
                self._known.discard(IDENTITY)
            with atomic(self.path / f"{hashlib.sha256(data).hexdigest()[:32]}.parquet", "wb", shared=True) as file:
                file.write(data)
        except OSError as error:
            reason = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EROFS: "read-only"}
            raise UserError(
                f"the store cannot be written: {reason.get(error.errno or 0, error.strerror)} at {self.path}; what "
                "was stored before is kept. Free space, or set store= to another folder, and start again"
            ) from error

    def _sweep(self) -> None:
        """Remove what killed writers left half written."""
        gone = 0
        for partial in list(self.path.glob("*.partial")):
            with suppress(OSError):  # another process does the same, or it may not be removed
                if time.time() - partial.stat().st_mtime > ABANDONED:
                    partial.unlink()
                    gone += 1
        if gone:
            self.warn(f"store: half-written files of killed runs, removed from {self.path}: {gone}")

    def fill(
        self,
        keys: Keys,
        compute: Callable[[np.ndarray, Callable[[int], None]], Any],
        shard: int,
        rank: int = 0,
        world: int = 1,
        advance: Callable[[int], None] = lambda done: None,
    ) -> int:
        """Compute and write what is missing of `keys`, this rank's share of it, `shard` items at a time.

        compute(indices, advance) returns the values of keys[indices] and calls advance(done) as it goes. Returns how
        many items this rank computed.
        """
        self._sweep()
        _, first = np.unique(keys, return_index=True)
        mine = np.sort(first)[rank::world]  # not of what is missing: ranks look at different times, and must agree
        todo = mine[self.missing(keys[mine])]
        computed = 0
        for begin in range(0, len(todo), shard):
            indices = todo[begin : begin + shard]
            fresh = indices[self.missing(keys[indices])]  # another job may have written some meanwhile
            advance(len(indices) - len(fresh))
            if len(fresh):
                self.write(keys[fresh], compute(fresh, advance))
                computed += len(fresh)
        return computed
