"""Divide work between processes of this machine."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from var.utils.errors import UserError
from var.utils.signals import end_with_parent

MOST_PROCESSES = 16
Part = TypeVar("Part")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Part], Result], parts: Iterable[Part], alone: int = 0) -> Iterator[Result]:
    """Yield `work(part)` for each part, in order, by as many processes as there are CPUs.

    The processes are forked, as those of `datasets`, so they start at once and share what `work` refers to. Parts and
    results are pickled. Without fork, this process does all the work.

    An error of `work` is raised here, as it is if it is a UserError, else as a RuntimeError with its traceback.

    alone: number of parts that this process does before it starts others.
    """
    parts = iter(parts)
    yield from map(work, islice(parts, alone))
    following = list(islice(parts, 2))
    parts, processes = chain(following, parts), min(count_cpus(), MOST_PROCESSES)
    if sys.platform != "linux" or processes < 2 or len(following) < 2:
        yield from map(work, parts)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start, (work,))
    try:
        pending = deque[Future[bytes]]()
        for part in parts:
            pending.append(pool.submit(_do, _dump(part)))  # the pool would hang on one that cannot be pickled
            if len(pending) > processes + 2:
                yield _open(pending.popleft().result())
        while pending:
            yield _open(pending.popleft().result())
    except BrokenProcessPool as error:
        raise UserError(
            "a process that reads or tokenizes rows was killed, as happens when memory runs out. Run the same command "
            "with fewer CPUs (`taskset -c 0-3 python …`) or with more memory."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def count_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(work: Callable[[Any], Any]) -> None:
    """Prepare a process of the pool. It must not outlive the one that writes, whose locks it would keep."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to all processes of a job; the first one handles them
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    _work[:] = [work]


def _do(part: bytes) -> bytes:
    """Return the pickled result of a part, or its error."""
    try:
        return _dump((_work[0](ForkingPickler.loads(part)), None))
    except UserError as error:
        return _dump((None, UserError(str(error))))
    except Exception:  # some exceptions cannot be pickled
        return _dump((None, RuntimeError(f"an error in another process:\n{traceback.format_exc()}")))


def _dump(value: Any) -> bytes:
    return bytes(ForkingPickler.dumps(value))


def _open(outcome: bytes) -> Any:
    """Return a result of `_do`, or raise its error."""
    result, error = ForkingPickler.loads(outcome)
    if error is not None:
        raise error
    return result


_work: list[Callable[[Any], Any]] = []
"""What a process of the pool does."""
