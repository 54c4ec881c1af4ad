"""The annotation cache: numbers that do not depend on θ, computed once and found again by their content.

annotations/<kind>/<key>/ is a table. It holds `fingerprint.json` (what the numbers depend on; its hash is the key) and
Arrow files of two columns: an item's content hash and its value. An item is a prompt, or a prompt with a response. It
does not depend on the plan, so another shuffle, B or subset of the rows finds it. An 8×8 annotation holds every 4×4 and
2×2 of the same plan.

Several ranks and jobs can fill one table at once, also on a network file system. Nothing that they leave behind can
block another one, and nothing depends on a lock. A file is written completely to a `.partial` file of its own, synced,
closed, and renamed to the hash of its bytes. So two writers never share a file, an interrupted one leaves only complete
files, and damage is detected. Files are merged in the same way: the merged file is complete before its parts are
removed, and whoever misses a part lists the folder again. At worst an item is computed twice; then every process reads
the same one of its values. NFS can show changes late: a file that is listed but not there is looked for again, and
`read` waits up to a minute for one that is not listed yet. Nobody reads a `.partial` file. Whoever fills the table
removes those older than a day and reports it.
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

from var.annotate.cache_column import Column, locate
from var.annotate.cache_files import (
    ARROW,
    PARQUET,
    Damaged,
    Foreign,
    Keys,
    Shard,
    choose,
    encode,
    is_full,
    load,
    merge,
    sync_folder,
    unique_keys,
    widen,
)
from var.annotate.cache_work import Work, claim, deal, release
from var.utils.errors import UserError
from var.utils.files import atomic
from var.utils.provenance import hash_content

FORMAT = 1  # incremented when the same fingerprint no longer gives the same numbers
FINGERPRINT = "fingerprint.json"
STALE = 60.0  # seconds for which an NFS client may show a folder as it was (acdirmax)
ABANDONED = 86_400.0  # seconds after which nobody is still writing a shard
PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds between looks at what other processes have written


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
        self._own = False  # whether fingerprint.json was seen to be this table's
        self._ignored: set[str] = set()  # files that need not be read again
        self._shards: dict[str, Shard] = {}
        self._name = hashlib.sha256(os.fsencode(path.absolute())).digest()[:16]  # of its claims on this machine
        self._can_merge = True

    def __len__(self) -> int:
        """Return the number of items in all files. One that two processes computed may count twice."""
        self.refresh()
        return sum(len(shard.keys) for shard in self._shards.values())

    def refresh(self) -> None:
        """Read new files. Damaged ones are moved away and ones of another form are ignored.

        Both are reported, and their items count as missing.
        """
        names = self._listed()
        if self._can_merge and any(name.endswith(PARQUET) and self._is_new(name) for name in names):
            self._convert()
            names = self._listed()
        while True:
            fresh = [name for name in names if self._is_new(name)]
            for name in fresh:
                self._load(name)
            self._drop(names, fresh)
            if not any(self._is_new(name) for name in fresh):
                return
            before, names = names, self._listed()  # another process merged some
            if names == before:  # NFS shows an old listing
                return

    def _is_new(self, name: str) -> bool:
        return name not in self._shards and name not in self._ignored

    def _drop(self, listed: list[str], fresh: list[str]) -> None:
        """Release files that were merged. Keep those of a folder that was removed."""
        for name in self._shards.keys() - set(listed):
            keys = self._shards[name].keys
            for other in (*fresh, *listed):  # the merged file is most likely a new one
                if len(keys) and other in self._shards:
                    keys = np.delete(keys, self._shards[other].match(keys)[0])
            if not len(keys):
                del self._shards[name]

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
        return sorted(name for name in names if name.endswith((ARROW, PARQUET)))

    def _is_own(self) -> bool:
        """Return whether fingerprint.json is this table's. Raise UserError if it is another table's."""
        file = self.path / FINGERPRINT
        if self._own or file.name in self._ignored:
            return self._own
        try:
            found = json.loads(file.read_bytes())
        except OSError:  # it does not exist yet
            return False
        except ValueError:
            self._ignored.add(file.name)
            self.warn(f"annotation cache: {file} is damaged. The next file that is written here restores it.")
            return False
        if hash_content(found) != hash_content(json.loads(json.dumps(self.fingerprint))):
            raise UserError(
                f"{file} does not match the name of its folder: it was copied or edited, so it is unknown what the "
                "numbers next to it depend on. Move the folder out of the annotation cache, or restore the file."
            )
        self._own = True
        return True

    def _load(self, name: str) -> None:
        """Read a file, unless it cannot be read."""
        path, aside = self.path / name, (self.path / name).with_suffix(".damaged")
        try:
            try:
                self._shards[name] = load(path, self.value)
            except Damaged:
                path.replace(aside)  # computed again, its items can have the same name
                self.warn(
                    f"annotation cache: checksum mismatch in {path}. It was moved to {aside.name} and its items will "
                    "be recomputed."
                )
            except Foreign as error:
                self._ignored.add(name)
                self.warn(
                    f"annotation cache: {path} {error}, expected key: {pa.binary(16)} and value: {self.value} without "
                    "nulls. It is ignored and its items will be recomputed."
                )
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # these: another process moved it, or NFS is late
                self._ignored.add(name)
                self.warn(
                    f"annotation cache: {path} cannot be read or moved ({error.strerror}). Its items count as missing."
                )

    def missing(self, keys: Keys) -> np.ndarray:
        """Return [n] bool: which items are missing."""
        self.refresh()
        wanted, _, place = unique_keys(keys)
        missing = np.ones(len(wanted), dtype=bool)
        for shard in self._shards.values():
            missing[shard.match(wanted)[0]] = False
        return missing[place]

    def read(self, keys: Keys) -> Column:
        """Return the values of `keys`, in their order. Raise KeyError if some are still missing after STALE seconds."""
        until = time.monotonic() + STALE
        while (absent := int(self.missing(keys).sum())) and time.monotonic() < until:
            time.sleep(0.5)
        if absent:
            raise KeyError(f"{absent} of {len(keys)} items are not in {self.path}")
        return locate(keys, list(self._shards.values()), widen(self.value))

    def write(self, keys: Keys, values: Any) -> str:
        """Add a file with the values of `keys`, completely or not at all, and return its name."""
        keys, first, _ = unique_keys(keys)
        try:
            return self._store(keys, self._column(values).take(pa.array(first)))
        except OSError as error:
            reason = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EROFS: "read-only"}
            raise UserError(
                f"annotation_cache: cannot be written: {reason.get(error.errno or 0, error.strerror)} at {self.path}. "
                "Earlier annotations are kept. Free disk space or set another folder, and run the same command again."
            ) from error

    def _column(self, values: Any) -> pa.Array:
        kind = widen(self.value)
        return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)

    def _store(self, keys: Keys, values: pa.Array) -> str:
        """Write a file and return its name."""
        name, data = encode(keys, values)
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._is_own() or not (self.path / FINGERPRINT).exists():  # the folder may have been removed
            text = json.dumps(self.fingerprint, indent=1, ensure_ascii=False)
            with atomic(self.path / FINGERPRINT, "wb", shared=True) as file:
                file.write(text.encode("utf-8", "surrogatepass"))  # as it is hashed
            self._ignored.discard(FINGERPRINT)
        with atomic(self.path / name, "wb", shared=True) as file:
            file.write(data)
        return name

    def _merge(self) -> None:
        """Merge files if there are too many, unless another process on this machine does."""
        if self._can_merge and (parts := choose(self._shards.values())) and claim(self._name):
            try:
                if all(part.path.exists() for part in parts):  # otherwise another process has just merged them
                    self._replace(parts)
            finally:
                release(self._name)

    def _replace(self, parts: Sequence[Shard]) -> None:
        """Merge files. Remove them once the merged one is on the disk and was read, and keep them if it cannot be."""
        try:
            name = self._store(*merge(parts))
            sync_folder(self.path)
            self._load(name)
            for part in parts if name in self._shards else ():
                if part.path.name != name:  # equal if the others hold nothing new
                    part.path.unlink(missing_ok=True)
                    del self._shards[part.path.name]
        except OSError:
            self._can_merge = False  # a fill need not stop for that

    def _convert(self) -> None:
        """Replace the Parquet files of an earlier version, so that they can be mapped. Other processes wait for it."""
        claim(self._name, wait=True)
        try:
            names = [name for name in self._listed() if name.endswith(PARQUET) and self._is_new(name)]
            parts: list[Shard] = []
            converted = 0
            for name in names:
                self._load(name)
                parts += [self._shards[name]] if name in self._shards else []
                if is_full(parts) or name == names[-1]:
                    if parts:
                        self._replace(parts)
                    if not self._can_merge:  # the disk is full or read-only; they can still be read
                        return
                    converted += len(parts)
                    parts.clear()
            if converted:
                self.warn(f"annotation cache: {converted} Parquet files in {self.path} were converted to Arrow files.")
        finally:
            release(self._name)

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
            shard: items per file, at most.
            rank: of this process.
            world: the number of processes.
            advance: called with the number of items that are done.
            part: [n] int, items with equal labels are computed by one rank, one after another. None: each by itself.
            cost: [n] the work of each item, by which ranks are balanced. None: 1.
        """
        self._sweep()
        mine = deal(keys, rank, world, part, cost)
        absent = np.flatnonzero(self.missing(keys[mine]))
        work, seen = Work(keys[mine], absent, self._name, shard), set(self._shards)
        missing, total, pause = mine[absent], 0, PAUSE

        def look(places: np.ndarray, computed: bool = False) -> np.ndarray:
            """Look for new files. Return [m] bool: which places are still missing. computed: whether they advanced."""
            left = work.left
            self.refresh()
            work.mark(self._shards[name] for name in self._shards.keys() - seen)
            seen.update(self._shards)
            still = ~work.done[places]
            advance(left - work.left - computed * int((~still).sum()))
            return still

        try:
            while work.left:
                places = work.take()
                places = places[look(places)]  # another process may have finished some before they were claimed
                if not len(places) and world > 1:
                    # A sharded model needs all ranks of a job, so none of them may wait for another job.
                    places = work.take(unclaimed=True)
                if len(places):
                    values = self._column(compute(missing[places], advance))
                    still = look(places, computed=True)  # a process on another machine may have been faster
                    if still.any():
                        seen.add(self.write(keys[missing[places[still]]], values.filter(pa.array(still))))
                    work.finish(places)
                    total, pause = total + len(places), PAUSE
                elif work.left:
                    if pause < LONGEST_PAUSE <= 2 * pause:
                        self.warn(f"annotation cache: waiting for {work.left} items that other processes compute.")
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                work.release()
                self._merge()
                seen.update(self._shards)
        finally:
            work.release()
        self.refresh()
        self._merge()
        return total
