"""ORPO: SFT on the chosen response plus its odds against the rejected one (Hong et al., arXiv 2403.07691, Eq. 6, 7).

Our NLL is per token of the pair's own chosen response. TRL's covers the prompt too, over the micro-batch's tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Mean, Metrics
from var.losses.common import pair_metrics
from var.models.packing import Packed
from var.requirements import Pairs, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ORPO:
    """Odds-ratio preference optimization on pairs, without a reference."""

    beta: float = 0.1
    """λ of the paper, above 0: the weight of the odds ratio next to the NLL."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(),)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError("loss.beta must be above 0. For 0 use loss=sft with data.responses=chosen.")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        mean = batch.sum_by_sequence(logps) / batch.length
        odds, nll = log_odds(mean), -mean[0::2]
        losses = nll - self.beta * logsigmoid(odds[0::2] - odds[1::2])
        metrics = pair_metrics(logps, batch, odds)
        metrics["nll/chosen"] = Mean(nll.detach().sum(), float(len(nll)))
        return losses.sum() / (batch.global_sequences / 2), metrics


def log_odds(logps: Tensor) -> Tensor:
    """Return log(p / (1 − p)) of p = exp(logps), in any shape.

    A p within rounding of 1 counts as 1 − eps and has no gradient. The log-probability of a certain token rounds to 0,
    where the odds are infinite.
    """
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - (-logps.expm1()).log()
