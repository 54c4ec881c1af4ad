"""Bound the time of code that a stranger wrote, such as the chat template of a model."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TimeLimitExceeded(Exception):
    """The code did not end in time."""


class _Stop(BaseException):
    """Ends the code, which may catch exceptions: Jinja does so when it computes constants."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeLimitExceeded if the `with` block takes longer. In other threads than the main one, do nothing.

    Python runs the handler between two instructions, so one long call of a C function can take longer. Blocks must not
    be nested. The handler of SIGALRM stays in place, because setting it for each of many short blocks is slow.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    if signal.getsignal(signal.SIGALRM) is not _end_block:
        signal.signal(signal.SIGALRM, _end_block)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Stop:  # also if the time is over while the timer is stopped
        raise TimeLimitExceeded(f"{what} took longer than {seconds:g} s") from None


def _end_block(*_: Any) -> None:
    raise _Stop
