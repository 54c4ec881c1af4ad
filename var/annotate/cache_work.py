"""Who computes what: the ranks of one job deal the items among them, and separate jobs claim them while they compute.

Jobs on one machine claim items by locking bytes of a file of that machine. The kernel releases the locks of a process
that ends, however it ends, so none can be left behind. Nothing depends on a claim: without it an item is computed
twice. Jobs on different machines see only each other's files. Once there are some, each of them continues at random
places, so that they seldom compute the same items.
"""

import fcntl
import heapq
import os
import random
import tempfile
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from var.annotate.cache_files import Keys, Shard, sort_order, unique_keys

RUNS = 32  # claims per shard
PIECES = 32  # if jobs share the work, each takes this fraction of the remaining items at once


def deal(
    keys: Keys, rank: int, world: int, part: np.ndarray | None = None, cost: np.ndarray | None = None
) -> np.ndarray:
    """Return the indices of the items that one rank computes: complete parts, in the order in which they begin.

    The most expensive part is dealt first, each to the rank with the least work so far. All items are dealt, not only
    missing ones: ranks must agree, and see missing ones at different times.

    Args:
        keys: [n] the items. Of equal ones, only the first counts.
        rank: of the process.
        world: the number of processes.
        part: [n] int, the label of each item's part. None: each item is a part.
        cost: [n] the work of each item. None: 1.
    """
    items = np.sort(unique_keys(keys)[1])
    if part is None and world == 1:
        return items
    part = items if part is None else part[items]
    _, first, place = np.unique(part, return_index=True, return_inverse=True)
    total = np.bincount(place, weights=None if cost is None else cost[items], minlength=len(first))
    owner = np.zeros(len(first), dtype=np.int64)
    loads = [(0.0, other) for other in range(world)]
    for label in np.lexsort((first, -total)) if world > 1 else ():
        load, owner[label] = loads[0]
        heapq.heapreplace(loads, (load + float(total[label]), int(owner[label])))
    mine = np.flatnonzero(owner[place] == rank)
    return items[mine[np.argsort(first[place[mine]], kind="stable")]]


@cache
def _locks(process: int) -> int:
    """Return the descriptor of this machine's file of locks. It stays open, since closing it releases all of them.

    process: its id. A forked child does not inherit locks, so it opens the file again.
    """
    path = Path(tempfile.gettempdir(), f"var-annotations-{os.getuid()}.lock")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def claim(name: bytes, wait: bool = False) -> bool:
    """Claim a name for this process. Return whether no other process on this machine has claimed it.

    Args:
        name: 8 bytes or more. The first 62 bits count.
        wait: whether to wait until no other process has claimed it.
    """
    try:
        operation = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        fcntl.lockf(_locks(os.getpid()), operation, 1, int.from_bytes(name[:8]) >> 2)
    except BlockingIOError:  # another process has it
        return False
    except OSError:  # this file system has no locks, so every claim succeeds
        pass
    return True


def release(name: bytes) -> None:
    """Release a claim of this process."""
    with suppress(OSError):
        fcntl.lockf(_locks(os.getpid()), fcntl.LOCK_UN, 1, int.from_bytes(name[:8]) >> 2)


class Work:
    """The missing items of one fill, in the order in which they are computed.

    They are divided into runs at keys that are multiples of a number. Jobs with other rows in between, or with a subset
    of the rows, therefore have mostly the same runs, and claim them by the same names, which are made of a run's first
    key.
    """

    def __init__(self, keys: Keys, missing: np.ndarray, table: bytes, shard: int) -> None:
        """Divide the items.

        Args:
            keys: [n] all items that this rank computes, in order.
            missing: [t] indices of the missing ones, in order.
            table: 16 bytes that name the table on this machine.
            shard: the largest number of items to compute at once.
        """
        self._run, self._shard = max(1, shard // RUNS), shard
        self.left = len(missing)
        self.done = np.zeros(len(missing), dtype=bool)
        self._shared = False  # whether another process was seen to compute some of the items
        self._order = sort_order(keys[missing])
        self._sorted = keys[missing][self._order]
        hashes = np.ascontiguousarray(keys, dtype="S16").view(np.uint8).reshape(-1, 16)
        begins = hashes[:, 8:12].copy().view(np.uint32)[:, 0] % self._run == 0
        begins[:1] = True
        starts = np.flatnonzero(begins)
        self._names = hashes[starts] ^ np.frombuffer(table, dtype=np.uint8)  # [r] of the runs
        self._bounds = np.searchsorted(missing, np.append(starts, len(keys)))  # [r + 1] in `missing`
        self._queue = deque(np.flatnonzero(np.diff(self._bounds)).tolist())
        self._claimed: list[int] = []

    def take(self, unclaimed: bool = False) -> np.ndarray:
        """Claim the next items and return their places. There are none if other processes have claimed all of them.

        unclaimed: whether to return items that other processes have claimed.
        """
        chunk: list[np.ndarray] = []
        runs: list[int] = []
        size = 0
        for _ in range(len(self._queue)):
            if (room := self._limit - size) <= 0:
                break
            run = self._queue.popleft()
            begin, end = self._bounds[run : run + 2]
            places = begin + np.flatnonzero(~self.done[begin:end])
            if not len(places):
                continue
            if not unclaimed and not claim(self._names[run].tobytes()):
                self._shared = True
                self._queue.append(run)
                continue
            runs.append(run)
            chunk.append(places[:room])
            size += len(chunk[-1])
        self._queue.extendleft(reversed(runs))  # a part of the last one may be left
        self._claimed += runs
        return np.concatenate([np.zeros(0, dtype=np.int64), *chunk])

    @property
    def _limit(self) -> int:
        """The number of items to compute at once. Jobs that share the work take few, so that they finish together."""
        return min(self._shard, max(self._run, self.left // PIECES)) if self._shared else self._shard

    def release(self) -> None:
        """Release all claims."""
        for run in self._claimed:
            release(self._names[run].tobytes())
        self._claimed.clear()

    def mark(self, shards: Iterable[Shard]) -> None:
        """Mark what files of other processes hold as done.

        If they hold any of the items, continue at a random place, since a process on another machine may compute the
        next ones.
        """
        for shard in shards:
            places = self._order[shard.match(self._sorted)[0]]
            if len(places):
                self._shared = True
                self._queue.rotate(random.SystemRandom().randrange(1 + len(self._queue)))
            self.finish(places)

    def finish(self, places: np.ndarray) -> None:
        """Mark items as done."""
        self.left -= int((~self.done[places]).sum())
        self.done[places] = True
