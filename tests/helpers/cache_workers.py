"""Processes that fill one table of the annotation cache at once, on a slow disk."""

import errno
import hashlib
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.cache import keys, open_table, read_shard, shards, values
from var.annotate import cache_files

# A process that has imported everything once and is forked for each worker: a worker starts in milliseconds.
context: Any = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["pandas", "pyarrow.compute", "var.annotate.cache"]
)  # pyarrow imports pandas when needed


class Disk:
    """A file on a slow disk, or on a disk that is full at `step`."""

    def __init__(self, file: Any, step: str) -> None:
        self.file, self.step = file, step

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()
        if self.step == "close":  # where NFS reports it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        self.file.write(data[:half])
        if self.step == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.step == "slow":
            self.file.flush()
            time.sleep(0.002)
        self.file.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def open_on_disk(step: str) -> Callable[..., Any]:
    """Return a Path.open that writes to such a disk."""
    plain = Path.open

    def open_(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = plain(path, mode, *rest, **options)
        return Disk(file, step) if mode == "xb" else file

    return open_


def work(
    root: Path,
    items: list[int],
    shard: int,
    seconds: float,
    ranks: tuple[int, int],
    machine: str,
    fanout: int,
    started: Any,
    results: Any,
) -> None:
    """Fill the table on a slow disk with the squares of `items`, in this order, each in `seconds`."""
    Path.open = open_on_disk("slow")  # type: ignore[method-assign]  # of this process
    platform.node, cache_files.FANOUT = lambda: machine, fanout
    tempfile.tempdir = str(root.with_name(f"{root.name}-{machine}"))  # its locks
    Path(tempfile.tempdir).mkdir(exist_ok=True)

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        time.sleep(seconds * len(indices))
        return [float(items[i] ** 2) for i in indices]

    table = open_table(root)
    started.wait()
    computed = table.fill(keys(*items), compute, shard, *ranks)
    complete = not table.missing(keys(*items)).any() and values(table, items) == [i**2 for i in items]
    results.put((computed, complete))


def start_workers(
    root: Path,
    parts: list[list[int]],
    shard: int = 3,
    seconds: float = 0.001,
    ranks: bool = False,
    machines: int = 1,
    fanout: int = cache_files.FANOUT,
) -> tuple[list[Any], Any]:
    """Start one process per part, all at once; return them and the queue of their results.

    Args:
        root: the folder of the cache.
        parts: the items of each process.
        shard: items per file.
        seconds: the time that an item takes.
        ranks: whether they are the ranks of one job.
        machines: on how many machines they seem to be.
        fanout: files that are merged into one.
    """
    started, results = context.Barrier(len(parts) + 1), context.SimpleQueue()
    places = [(i, len(parts)) if ranks else (0, 1) for i in range(len(parts))]
    jobs = [
        context.Process(
            target=work, args=(root, part, shard, seconds, place, f"machine{i % machines}", fanout, started, results)
        )
        for i, (part, place) in enumerate(zip(parts, places, strict=True))
    ]
    for job in jobs:
        job.start()
    started.wait(60)
    return jobs, results


def assert_sound(root: Path, items: range) -> None:
    """Assert that every shard matches its name, and that every item that is there has the right value."""
    reports: list[str] = []
    table = open_table(root, warn=reports.append)
    for path in shards(table):
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:32] == path.stem
        read_shard(path)
    held = np.array(items)[~table.missing(keys(*items))].tolist()
    assert values(table, held) == [i**2 for i in held]
    assert reports == []
