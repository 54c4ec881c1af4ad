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
    """Wait until `count` of the named devices are free, and lock them. Yield the lock files by device.

    The kernel releases a lock when all processes that have its file open are dead. One job at a time collects devices,
    so that two jobs never wait for each other's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files, (folder / "turn").open("w") as turn:
        locked, waiting = dict[str, IO[str]](), False
        my_turn = _lock(turn)
        while len(locked) < count:
            for name in names if my_turn else ():
                if name not in locked and len(locked) < count:
                    file = files.enter_context((folder / f"device-{name.replace('/', '_')}").open("w"))
                    if _lock(file):
                        locked[name] = file
            if len(locked) < count:
                if not waiting:
                    say(f"Waiting for {count} of the GPUs {', '.join(names)}")
                waiting = True
                time.sleep(POLL_SECONDS)
                my_turn = my_turn or _lock(turn)
        turn.close()
        yield {name: locked[name] for name in names if name in locked}


def _lock(file: IO[str]) -> bool:
    """Lock a file, and return whether that was possible."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
