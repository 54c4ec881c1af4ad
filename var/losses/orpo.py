"""ORPO: SFT on the chosen response and its odds against the rejected one (Hong et al., arXiv 2403.07691, Eq. 6, 7).

Our NLL is per token of the pair's own chosen response; TRL's covers the prompt too, over the micro-batch's tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Mean, Metrics
from var.losses.common import pair_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ORPO:
    """beta: λ of the paper, > 0, the weight of the odds ratio beside the NLL."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError("loss.beta is λ > 0 of the paper; for 0 use loss=sft with data.responses=chosen")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        mean = batch.sum_by_sequence(logps) / batch.length
        odds, nll = log_odds(mean), -mean[0::2]
        losses = nll - self.beta * logsigmoid(odds[0::2] - odds[1::2])
        metrics = pair_metrics(logps, batch, odds)
        metrics["nll/chosen"] = Mean(nll.detach().sum(), float(len(nll)))
        return losses.sum() / (batch.global_sequences / 2), metrics


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = exp(logps), any shape.

    A p within rounding of 1 counts as 1 − eps and has no gradient: log-probabilities of a certain token round to 0,
    where the odds are infinite.
    """
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - (-logps.expm1()).log()
