"""RPO: DPO plus an NLL of the chosen response (Pang et al., Iterative Reasoning Preference Optimization, arXiv
2404.19733, Eq. 1).

As there, the NLL of a pair is per token of its own chosen response, so that every pair counts the same. TRL's
`sft` term beside `sigmoid` divides by the chosen tokens of the micro-batch instead: long responses count more.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Mean, Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RPO:
    """beta: β > 0, DPO's. alpha: α > 0, the weight of the NLL, 1 in the paper."""

    beta: float = 0.1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.alpha > 0:
            raise UserError("loss.beta is β > 0 and loss.alpha is α > 0; for α = 0 use loss=dpo")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        ratio = log_ratios(logps, batch)
        nll = -(batch.sum_by_sequence(logps) / batch.length)[0::2]
        losses = self.alpha * nll - logsigmoid(self.beta * (ratio[0::2] - ratio[1::2]))
        metrics = pair_metrics(logps, batch, self.beta * ratio)
        metrics["nll/chosen"] = Mean(nll.detach().sum(), float(len(nll)))
        return losses.sum() / (batch.global_sequences / 2), metrics
