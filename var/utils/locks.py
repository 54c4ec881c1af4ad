"""Locks on files that the kernel releases when their process dies, however it dies. So none can be left behind."""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from var.utils.console import say
from var.utils.errors import UserError

LOCK = ".lock"  # in a folder that has one writer
ERROR = "error.txt"  # in the folder of a run: why it failed
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
    until, said = time.monotonic() + wait, False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            if try_lock(file):
                if not _is_at(file, path):  # its last holder has removed it
                    continue
                file.truncate(0)
                json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
                file.flush()
                yield
                return
            holder = _read_holder(file)
        if time.monotonic() >= until:
            raise UserError(f"{holder} {doing}, and holds {path}. Wait until it is done, or end it.")
        if not said:
            say(f"Waiting for {holder}, which {doing}")
            said = True
        time.sleep(min(POLL, max(0.0, until - time.monotonic())))


def claim_folder(folder: Path, doing: str) -> AbstractContextManager[None]:
    """Be the only process that writes to a folder within the context, or raise a UserError that names the other one."""
    return hold(folder / LOCK, doing, wait=0)


def remove_unused(folder: Path, disposable: Collection[str]) -> None:
    """Remove a folder that has only files with these names, unless another process has claimed it."""
    disposable = {LOCK, *disposable}
    with suppress(OSError, UserError):
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= disposable:
            with claim_folder(folder, "writes to this folder"):
                if {path.name for path in folder.iterdir()} <= disposable:
                    shutil.rmtree(folder)


def find_holder(folder: Path) -> str | None:
    """Return the process that has claimed a folder, in words; None if there is none."""
    try:
        with (folder / LOCK).open("r+") as file:
            return None if try_lock(file) else _read_holder(file)
    except OSError:  # it was never claimed, or may not be written
        return None


def _is_at(file: IO[str], path: Path) -> bool:
    """Return whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(file: IO[str]) -> str:
    """Return the process that a lock file names, in words."""
    file.seek(0)
    try:
        holder = json.load(file)
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}"
    except (ValueError, TypeError, KeyError, RecursionError):  # it has the lock and has not written yet
        return "another process"
