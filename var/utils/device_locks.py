"""Claim devices of this machine for a job, so that no two jobs use the same one."""

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from var.utils.console import say

POLL_SECONDS = 0.5


def name_devices(visible: str | None, count: int) -> list[str]:
    """Return the names of `count` GPUs: those that CUDA_VISIBLE_DEVICES lists, or 0, 1, … if it is not set."""
    names = map(str, range(count)) if visible is None else (name.strip() for name in visible.split(","))
    return list(names)[:count]


@contextmanager
def claim(names: Sequence[str], count: int, folder: Path) -> Iterator[dict[str, IO[str]]]:
    """Wait until `count` of the named devices are free, and lock them. Yield their lock files by name.

    folder: the same for all jobs. The kernel releases a lock when all processes that have its file open are dead. A job
    never holds some devices while it waits for others, so jobs cannot block each other. A job that needs more devices
    than the others may start last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, (folder / "turn").open("w") as turn:
        files = {name: stack.enter_context((folder / name.replace("/", "_")).open("w")) for name in names}
        waiting = False
        while True:
            fcntl.flock(turn, fcntl.LOCK_EX)
            free = [name for name in names if try_lock(files[name])]
            claimed = free[:count] if len(free) >= count else []
            for name in free[len(claimed) :]:
                fcntl.flock(files[name], fcntl.LOCK_UN)
            fcntl.flock(turn, fcntl.LOCK_UN)
            if claimed:
                break
            if not waiting:
                say(f"Waiting for {count} of the GPUs {', '.join(names)}")
            waiting = True
            time.sleep(POLL_SECONDS)
        yield {name: files[name] for name in claimed}


def try_lock(file: IO[str]) -> bool:
    """Lock a file for this open file, and return whether that was possible. A lock that it has already stays."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
