"""A folder of the cache: complete and undamaged, or absent. `finish` marks it as complete with checksums."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from var.utils.console import warn
from var.utils.files import atomic, remove
from var.utils.locks import hold
from var.utils.provenance import hash_content, hash_file

DONE = "done.json"
DATA = (".arrow", ".npy")  # the endings of files with content
WAIT = 6 * 3600.0  # seconds for which a process waits for another one that writes the same folder


def finish(target: Path, facts: Mapping[str, Any]) -> None:
    """Mark a folder as complete, with the checksums of its files. Other processes may be reading it.

    facts: JSON values that `read_finished` returns.
    """
    files = {path.name: hash_file(path) for path in sorted(target.iterdir()) if path.suffix in DATA}
    content = {"facts": dict(facts), "files": files}
    with atomic(target / DONE, shared=True) as file:
        json.dump({**content, "checksum": hash_content(content).hex()}, file)


def read_finished(target: Path) -> dict[str, Any] | None:
    """Return what was passed to `finish`, or None for a folder that is not complete.

    A damaged folder is not complete. Its files are removed, which is reported.
    """
    if not (target / DONE).exists():
        return None
    try:
        content = json.loads((target / DONE).read_text())
        own = content.pop("checksum") == hash_content(content).hex()
        own = own and all(Path(name).name == name for name in content["files"])
        if own:
            damaged = [name for name, digest in content["files"].items() if _verify(target / name) != digest]
            if not damaged:
                return dict(content["facts"])
        else:  # the names in it may be those of other files
            damaged = [DONE, *(path.name for path in sorted(target.iterdir()) if path.suffix in DATA)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        damaged = [DONE]
    warn(f"cache: {', '.join(damaged)} in {target} is damaged. It is made again.")
    for name in (DONE, *damaged):
        (target / name).unlink(missing_ok=True)
    return None


def make(target: Path, doing: str, write: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `read_finished` does, after writing the folder if it is not complete.

    One process writes, and others wait for it.

    Args:
        target: the folder.
        doing: what the process that writes does, in messages: "reads rows".
        write: writes the files, and returns the facts for `finish`.
    """
    if (facts := read_finished(target)) is not None:
        return facts
    with hold(target / "lock", doing, WAIT):
        if (facts := read_finished(target)) is None:  # else another process has done it meanwhile
            for left in (*target.glob("*.partial"), *target.glob("tmp*/")):  # of a process that was killed
                remove(left)
            finish(target, write())
            facts = read_finished(target)
    assert facts is not None
    return facts


def remember(target: Path, doing: str, compute: Callable[[], np.ndarray], **facts: Any) -> np.ndarray:
    """Return the array that `compute` returns, which is computed once and then mapped from a file in `target`.

    facts: JSON values that `read_finished` returns.
    """

    def write() -> Mapping[str, Any]:
        with atomic(target / "array.npy", "wb", shared=True) as file:
            np.save(file, compute())
        return facts

    make(target, doing, write)
    return map_array(target / "array.npy")


def map_array(path: Path) -> np.ndarray:
    """Return the array in a file, mapped into memory and read only."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


def _verify(path: Path) -> str:
    """Return the checksum of a file, which is read once per process unless it changes."""
    status = path.stat()
    return _hash_once(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1000)
def _hash_once(path: Path, *status: int) -> str:
    return hash_file(path)
