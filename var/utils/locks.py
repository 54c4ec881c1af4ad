"""Locks on files that the kernel releases when their process dies, however it dies. So none can be left behind."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from var.utils.console import say
from var.utils.errors import UserError

POLL = 0.2  # seconds between two tries
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # some network file systems know no locks


def try_lock(file: IO[str]) -> bool:
    """Lock an open file, and return whether that was possible. On a file system without locks it always is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


@contextmanager
def hold(path: Path, doing: str, wait: float) -> Iterator[None]:
    """Hold the lock of a file within the context. Wait for another process that holds it, and say for which one.

    Args:
        path: the file, which is made if it does not exist, and remains.
        doing: what the holder does, in messages: "reads rows".
        wait: seconds until a UserError names the process that still holds it.
    """
    with path.open("a+") as file:
        until, said = time.monotonic() + wait, False
        while not try_lock(file):
            holder = _read_holder(file)
            if time.monotonic() >= until:
                raise UserError(f"{holder} {doing}, and holds {path}. End it, or wait until it is done.")
            if not said:
                say(f"Waiting for {holder}, which {doing}")
                said = True
            time.sleep(min(POLL, max(0.0, until - time.monotonic())))
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        yield


def _read_holder(file: IO[str]) -> str:
    """Return the process that a lock file names, in words."""
    file.seek(0)
    try:
        holder = json.load(file)
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}"
    except (ValueError, TypeError, KeyError, RecursionError):  # it has the lock and has not written yet
        return "another process"
