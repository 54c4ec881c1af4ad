"""EXO-pref for a pair: KL of the policy's preference from the smoothed label's (Ji et al., arXiv 2402.00856, Eq. 16).

Conservative DPO minimizes the KL of the same two distributions in the other direction, up to a constant.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Pairs, ReferenceLogps, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EXO:
    """Reverse-KL preference optimization on pairs."""

    beta: float = 0.1
    """β_π > 0. The margin of log-ratios tends to log((1 − ε)/ε)/β."""
    label_smoothing: float = 0.001
    """ε in (0, 1/2): the labels prefer the better response with probability 1 − ε. At ε = 0 the KL is infinite."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 < self.label_smoothing < 0.5:
            raise UserError("loss.beta must be above 0 and loss.label_smoothing in (0, 0.5)")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        ratio = log_ratios(logps, batch)
        margin = self.beta * (ratio[0::2] - ratio[1::2])
        better = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-self.label_smoothing))
        worse = (-margin).sigmoid() * (logsigmoid(-margin) - math.log(self.label_smoothing))
        losses = better + worse
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)
