"""What a loss is: the protocol, and the type of its metrics."""

from typing import NamedTuple, Protocol

from torch import Tensor

from var.models.packing import Packed
from var.requirements import Requirement


class Mean(NamedTuple):
    """A metric of one micro-batch as a sum and a count, so that its mean over ranks and accumulation is exact.

    `torchmetrics` would reduce each metric over the ranks by itself; `AlignmentModule` reduces all of them at once.
    """

    total: Tensor | float
    """The sum over what is counted, without a gradient."""
    number: Tensor | float
    """How many items it sums over. Metrics with a count of zero are omitted."""


Metrics = dict[str, Mean]


class Loss(Protocol):
    """A frozen dataclass of hyper-parameters with a list of requirements and one function of numbers."""

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """What the batch must hold. Each requirement fills fields of the batch."""
        ...

    def __call__(self, outputs: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return this micro-batch's part of the optimizer step's loss, and its metrics.

        The divisor is that of the complete optimizer step, over all ranks and accumulated micro-batches
        (`batch.global_tokens`, `global_sequences` or `global_groups`), so the parts add up. A loss never takes a mean.

        Args:
            outputs: [N] nats, log π_θ of each response token. A reward model gives [B] scores instead.
            batch: the micro-batch, with the fields that the requirements fill.
        """
        ...
