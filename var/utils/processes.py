"""Divide work between processes of this machine."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from var.utils.errors import UserError
from var.utils.signals import end_with_parent

MOST_PROCESSES = 16
Part = TypeVar("Part")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Part], Result], parts: Iterable[Part], alone: int = 0) -> Iterator[Result]:
    """Yield `work(part)` for each part, in order, by as many processes as there are CPUs.

    The processes are forked, as those of `datasets`, so they start at once and share what `work` refers to. Parts and
    results are pickled. An error of `work` is raised here. Without fork, this process does all the work.

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
        pending = deque[Future[Result]]()
        for part in parts:
            pending.append(pool.submit(_do, part))
            if len(pending) > processes + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
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
    end_with_parent(signal.SIGKILL)
    _work.append(work)


def _do(part: Any) -> Any:
    return _work[0](part)


_work: list[Callable[[Any], Any]] = []
"""What a process of the pool does."""
