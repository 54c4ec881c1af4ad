"""What a loss is: the protocol and the metric type."""

from typing import NamedTuple

from torch import Tensor


class Mean(NamedTuple):
    """A metric of this micro-batch as total and number, so that the mean over ranks and accumulation is exact."""

    total: Tensor
    number: Tensor | float


Metrics = dict[str, Mean]
