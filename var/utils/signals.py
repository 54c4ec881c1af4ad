"""End on SIGTERM or SIGUSR1, which SLURM and others send before they kill a process."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM and others send before they kill; USR1 on request

SETTLE = 3.0  # seconds in which a process that has saved its state closes its files
GRACE = 60.0  # seconds in which a process can save its state
FIRST_RANK = "VAR_FIRST_RANK"  # the variable with the process of the first rank, for the ranks that it starts
PR_SET_PDEATHSIG = 1  # an option of Linux's prctl

_left = threading.Event()  # set when this process leaves after a signal


def end_with_parent(number: int) -> None:
    """Let the kernel send this signal to this process when its parent dies. This needs Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def follow_parent() -> None:
    """End this process when its parent has died: by SIGTERM, which lets it save, and by force after GRACE seconds.

    Unlike `end_with_parent`, it does not matter which thread of the parent has started this process.
    """
    _watch(os.getppid(), signal.SIGTERM)  # by force, since a worker of a pool would wait for its next job


def follow_first_rank() -> None:
    """End a rank that the first one has started GRACE seconds after the first one. Call it in every rank.

    If the first rank is killed, the others would connect to it or wait at a barrier for up to trainer.timeout_hours.
    Launchers such as torchrun and SLURM set RANK and end the ranks themselves.
    """
    if "RANK" in os.environ:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[FIRST_RANK] = str(os.getpid())
    elif FIRST_RANK in os.environ:
        _watch(int(os.environ[FIRST_RANK]), None)  # at a normal end, it finishes in this time


def _watch(parent: int, number: int | None) -> None:
    """When this process has another parent, send it a signal, unless that is None, and end it.

    It has GRACE seconds, or SETTLE after it has saved its state.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        if number is not None:
            os.kill(os.getpid(), number)
            _left.wait(GRACE)
        time.sleep(GRACE if number is None else SETTLE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def leave(number: int, frame: FrameType | None = None, *, saved: str = "") -> None:
    """End the process with status 128 plus the signal. Finished shards, checkpoints and files are complete."""
    from var.utils.console import say

    say(f"Received {signal.Signals(number).name}{saved}. Run the same command to resume.")
    _left.set()
    raise SystemExit(128 + number)


def handle_signals(
    handler: Callable[[int, FrameType | None], Any], signals: Iterable[signal.Signals] = SIGNALS
) -> None:
    """Let `handler` handle signals. Python delivers them only to the main thread; elsewhere this does nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in signals:
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
