"""RPO: DPO plus an NLL of the chosen response (Pang et al., arXiv 2404.19733, Eq. 1).

The paper is Iterative Reasoning Preference Optimization.

The NLL of a pair is per token of its own chosen response, so every pair counts the same. TRL's `sft` term next to
`sigmoid` divides by the chosen tokens of the micro-batch, so long responses count more.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Mean, Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Pairs, ReferenceLogps, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RPO:
    """DPO with a likelihood term on pairs."""

    beta: float = 0.1
    """β > 0, DPO's KL coefficient."""
    alpha: float = 1.0
    """α > 0, the weight of the NLL; 1 in the paper."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.alpha > 0:
            raise UserError("loss.beta and loss.alpha must be above 0. For α = 0 use loss=dpo.")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        ratio = log_ratios(logps, batch)
        nll = -(batch.sum_by_sequence(logps) / batch.length)[0::2]
        losses = self.alpha * nll - logsigmoid(self.beta * (ratio[0::2] - ratio[1::2]))
        metrics = pair_metrics(logps, batch, self.beta * ratio)
        metrics["nll/chosen"] = Mean(nll.detach().sum(), float(len(nll)))
        return losses.sum() / (batch.global_sequences / 2), metrics
