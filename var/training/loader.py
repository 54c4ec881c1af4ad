"""This rank's micro-batches, from the plan."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from var.models.packing import Packed
from var.utils.distributed import Ranks

if TYPE_CHECKING:
    from var.training.datamodule import AlignmentData


class PlanLoader:
    """This rank's micro-batches, epoch by epoch, from where a resumed run stopped."""

    def __init__(self, data: "AlignmentData", ranks: Ranks) -> None:
        self.data, self.ranks = data, ranks

    def __len__(self) -> int:
        return self.data.plan.length(self.ranks.world)

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own: the position is the DataModule's. Without the pair Lightning warns at each resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""

    def __iter__(self) -> Iterator[Packed]:
        epoch, begin = self.data.position(len(self))
        shares = islice(self.data.plan.batches(epoch, self.ranks.rank, self.ranks.world), begin, None)
        yield from ahead(map(self.data.batch, shares))


def ahead(batches: Iterator[Packed]) -> Iterator[Packed]:
    """The same, each made by a thread while the one before trains; pinned, where there is a GPU to take it."""

    def following() -> Packed | None:
        batch = next(batches, None)
        return batch.pinned() if batch is not None and torch.cuda.is_available() else batch

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(following)
        while (batch := coming.result()) is not None:
            coming = thread.submit(following)
            yield batch
