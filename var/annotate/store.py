"""The store: numbers that do not depend on θ, computed once, found again by their content.

annotations/<kind>/<key>/ holds `identity.json` (what the numbers depend on; its hash is the key) and shards
`<sha256>.parquet` of two columns: the item's content hash and its value. An item is a prompt or a prompt with a
response, whatever the plan, so that another shuffle, B or subset of the rows finds what is there; an 8×8 annotation
holds every 4×4 and 2×2 of the same plan. Shards are only ever added, under the hash of their bytes: a killed run
leaves whole shards, two writers cannot spoil one another, and a damaged shard betrays itself.
"""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from var.data.rows import content_hash
from var.problems import UserError

FORMAT = 1  # raised when the same identity would no longer give the same numbers

Keys = np.ndarray  # [n] of dtype S16, content hashes


def as_keys(hashes: Sequence[bytes]) -> Keys:
    """[n] content hashes as one array that sorts and searches fast."""
    return np.array(hashes, dtype="S16")


class Store:
    """A folder of shelves, one for each kind and identity."""

    def __init__(self, root: str | Path, warn: Callable[[str], None] = print) -> None:
        self.root, self.warn = Path(root), warn

    def shelf(self, kind: str, identity: Mapping[str, Any], value: pa.DataType) -> "Shelf":
        """The shelf of `kind` for numbers that depend on `identity` (JSON values) and on the item alone."""
        identity = {"format": FORMAT, "kind": kind, **identity}
        return Shelf(self.root / kind / content_hash(identity).hex()[:16], identity, value, self.warn)


class Shelf:
    """Items of one kind and identity: `missing`, `read`, `write`, `fill`."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], value: pa.DataType, warn: Callable[[str], None]
    ) -> None:
        self.path, self.identity, self.value, self.warn = path, identity, value, warn
        self._known: set[str] = set()
        self._keys = as_keys([])
        self._values = pa.array([], type=value)
        self._order = np.array([], dtype=np.int64)

    def __len__(self) -> int:
        self.refresh()
        return len(self._keys)

    def refresh(self) -> None:
        """Read shards written since the last look; a damaged one is set aside, reported, and its items are missing."""
        fresh = sorted(p for p in self.path.glob("*.parquet") if p.name not in self._known)
        tables = {path.name: table for path in fresh if (table := self._load(path)) is not None}
        if not tables:
            return
        self._known |= set(tables)  # a damaged one is not: computed again it may have the same bytes, hence its name
        keys = [self._keys, *(as_keys(table["key"].to_pylist()) for table in tables.values())]
        values = [self._values, *(chunk for table in tables.values() for chunk in table["value"].chunks)]
        self._keys, self._values = np.concatenate(keys), pa.concat_arrays(values)
        self._order = np.argsort(self._keys, kind="stable")

    def _load(self, path: Path) -> pa.Table | None:
        aside = path.with_suffix(".damaged")
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest()[:32] == path.stem:
                return pq.read_table(pa.BufferReader(data))
            path.replace(aside)
        except FileNotFoundError:  # another process has set it aside
            return None
        except OSError as error:
            self._known.add(path.name)
            self.warn(f"store: {path} cannot be used or set aside ({error.strerror}); its items count as missing")
            return None
        self.warn(f"store: the checksum of {path} is off; set aside as {aside.name}, its items are computed again")
        return None

    def missing(self, keys: Keys) -> np.ndarray:
        """[n] bool: which items are not held."""
        self.refresh()
        return self._find(keys) < 0

    def read(self, keys: Keys) -> pa.Array:
        """The values of `keys`, in their order. KeyError counts the missing ones."""
        self.refresh()
        found = self._find(keys)
        if (found < 0).any():
            raise KeyError(f"{int((found < 0).sum())} of {len(keys)} items are not in {self.path}")
        return self._values.take(pa.array(found))

    def _find(self, keys: Keys) -> np.ndarray:
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self._keys, keys, sorter=self._order).clip(max=len(self._keys) - 1)
        found = self._order[at]
        return np.where(self._keys[found] == keys, found, -1)

    def write(self, keys: Keys, values: Any) -> None:
        """Add one shard, whole or not at all."""
        column = values if isinstance(values, pa.Array) else pa.array(values, type=self.value)
        # numpy cuts trailing zero bytes off an S16; tobytes keeps all 16
        hashes = pa.array([keys[i : i + 1].tobytes() for i in range(len(keys))], type=pa.binary(16))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"key": hashes, "value": column}), sink)
        data = sink.getvalue().to_pybytes()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "identity.json").exists():
                self._put("identity.json", json.dumps(self.identity, indent=1, ensure_ascii=False).encode())
            self._put(f"{hashlib.sha256(data).hexdigest()[:32]}.parquet", data)
        except OSError as error:
            reason = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EROFS: "read-only"}
            raise UserError(
                f"the store cannot be written: {reason.get(error.errno or 0, error.strerror)} at {self.path}; what "
                "was stored before is kept. Free space, or set store= to another folder, and start again"
            ) from error

    def _put(self, name: str, data: bytes) -> None:
        partial = self.path / f"{uuid.uuid4().hex}.partial"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

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
