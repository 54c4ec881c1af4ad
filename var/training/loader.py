"""This rank's micro-batches of the plan, each made by a thread while the previous one trains."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from var.data.plan import MicroBatch, Plan
from var.models.packing import Packed
from var.utils.distributed import Ranks


class PlanLoader:
    """Yields this rank's micro-batches of an epoch, from where a resumed run stopped."""

    def __init__(
        self,
        plan: Plan,
        make_batch: Callable[[MicroBatch], Packed],
        position: Callable[[int], tuple[int, int]],
        ranks: Ranks,
    ) -> None:
        self.plan, self.make_batch, self.position, self.ranks = plan, make_batch, position, ranks

    def __len__(self) -> int:
        return self.plan.length(self.ranks.world)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the position. Without this method Lightning warns at each resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; see `state_dict`."""

    def __iter__(self) -> Iterator[Packed]:
        epoch, start = self.position(len(self))
        micro_batches = islice(self.plan.batches(epoch, self.ranks.rank, self.ranks.world), start, None)
        yield from prefetch(map(self.make_batch, micro_batches))


def prefetch(batches: Iterator[Packed]) -> Iterator[Packed]:
    """Yield the batches, each made by a thread while the previous one is used, in pinned memory if there is a GPU."""

    def load() -> Packed | None:
        batch = next(batches, None)
        return None if batch is None else batch.pinned()

    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(load)
        while (batch := pending.result()) is not None:
            pending = thread.submit(load)
            yield batch
