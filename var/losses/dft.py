"""DFT and ASFT: SFT whose tokens are weighted by the policy's own probability (Wu et al., arXiv 2508.05629).

The weight is π_θ(y_t), detached. ASFT (Zhu et al., arXiv 2509.23753) adds β KL(π_ref ‖ π_θ) at each token. That KL is
a sum over the vocabulary, which this package does not keep for the reference. In expectation over tokens that π_ref
samples, its gradient is that of β times SFT's loss, and this is how it is computed here: β is added to each weight. On
other responses, and on samples that were selected by their reward, the term is SFT and not ASFT's KL.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import response_metrics
from var.models.packing import Packed
from var.requirements import Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DFT:
    """Token probability times NLL, and an anchor."""

    anchor: float = 0.0
    """β ≥ 0, the weight of ASFT's KL; 0 is DFT."""

    requires: ClassVar[tuple[Requirement, ...]] = ()

    def __post_init__(self) -> None:
        if not self.anchor >= 0:
            raise UserError(f"loss.anchor must be at least 0, got {self.anchor}")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return this micro-batch's sum over tokens, divided by the step's response tokens, and its metrics."""
        weights = logps.detach().exp() + self.anchor
        metrics = {**response_metrics(logps, batch), "weight/mean": Mean(weights.sum(), float(len(weights)))}
        return -(weights * logps).sum() / batch.global_tokens, metrics
