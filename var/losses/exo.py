"""EXO-pref for a pair: KL of the policy's preference from the smoothed label's (Ji et al., arXiv 2402.00856, Eq. 16).

Conservative DPO is the other direction, the forward KL of the same two distributions, up to a constant.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EXO:
    """beta: β_π > 0. label_smoothing: ε in (0, 1/2), the labels say better with 1 − ε; at 0 the KL is infinite.

    The margin of log-ratios is drawn to log((1 − ε)/ε)/β and not beyond.
    """

    beta: float = 0.1
    label_smoothing: float = 0.001

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 < self.label_smoothing < 0.5:
            raise UserError("loss.beta is β > 0 and loss.label_smoothing lies in (0, 0.5)")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        ratio = log_ratios(logps, batch)
        margin = self.beta * (ratio[0::2] - ratio[1::2])
        better = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-self.label_smoothing))
        worse = (-margin).sigmoid() * (logsigmoid(-margin) - math.log(self.label_smoothing))
        losses = better + worse
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)
