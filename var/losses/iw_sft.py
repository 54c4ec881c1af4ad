"""iw-SFT: SFT weighted by how much likelier the policy finds a response than the reference (arXiv 2507.12856).

Qin and Springenberg derive the weight π_θ(y|x)/π_ref(y|x), which makes SFT on curated responses a tighter bound of the
expected reward. As in their code, the log-ratio is a mean over tokens, the weight is detached and bounded, and the loss
is a mean over tokens. Curate the responses first, for example with data.responses=best.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import log_ratios, weighted_nll
from var.models.packing import Packed
from var.requirements import ReferenceLogps, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class IWSFT:
    """NLL weighted by the bounded ratio of policy and reference."""

    exponent: float = 1.0
    """The power of the ratio, above 0."""
    largest: float = 16.0
    """The largest weight, at least 1."""

    requires: ClassVar[tuple[Requirement, ...]] = (ReferenceLogps(),)

    def __post_init__(self) -> None:
        if not self.exponent > 0 or not 1 <= self.largest < math.inf:
            raise UserError(
                "loss.exponent must be above 0, and loss.largest at least 1 and finite. For weight 1 use loss=sft."
            )

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return this micro-batch's sum over tokens, divided by the step's response tokens, and its metrics."""
        ratio = self.exponent * log_ratios(logps.detach(), batch) / batch.length
        return weighted_nll(logps, ratio.clamp(max=math.log(self.largest)).exp(), batch, "token")
