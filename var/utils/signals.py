"""End on SIGTERM or SIGUSR1, which SLURM and others send before they kill a process."""

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM and others send before they kill; USR1 on request

PR_SET_PDEATHSIG = 1  # an option of Linux's prctl


def end_with_parent(number: int) -> None:
    """Let the kernel send this signal to this process when its parent dies. This needs Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def leave(number: int, frame: FrameType | None = None, *, saved: str = "") -> None:
    """End the process with status 128 plus the signal. Finished shards, checkpoints and files are complete."""
    from var.utils.console import say

    say(f"Received {signal.Signals(number).name}{saved}. Run the same command to resume.")
    raise SystemExit(128 + number)


def handle_signals(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Let `handler` handle SIGNALS. Python delivers signals only to the main thread; elsewhere this does nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Leave on SIGNALS within the `with` block, unless a handler that it installs saves something first."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handle_signals(leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
