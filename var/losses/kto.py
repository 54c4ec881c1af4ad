"""KTO: each response alone, desirable or not, against a reference point (Ethayarajh et al., arXiv 2402.01306).

z0, the policy's KL from the reference, is estimated as in the paper from responses that answer other prompts, in each
micro-batch on its own: the one number here that changes with the micro-batch's size. TRL averages it over ranks too.
"""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import log_ratios
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class KTO:
    """beta: β > 0. desirable_weight, undesirable_weight: λ_D, λ_U > 0; the paper has λ_D n_D / (λ_U n_U) in [1, 3/2].
    threshold: a reward above it is desirable, in reward units; None: the data's order, better or worse, says so.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.desirable_weight > 0 or not self.undesirable_weight > 0:
            raise UserError("loss.beta, loss.desirable_weight and loss.undesirable_weight are > 0")

    @property
    def needs(self) -> frozenset[Need]:
        needs = {Need.DESIRABLE, Need.REFERENCE_LOGPS, Need.MISMATCHED_LOGPS}
        return frozenset(needs if self.threshold is None else needs | {Need.REWARDS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Mean over the step's sequences."""
        assert batch.desirable is not None
        assert batch.mismatched_logps is not None
        assert batch.mismatched_reference_logps is not None
        ratio = log_ratios(logps, batch)
        size, good, bad = float(len(batch)), batch.desirable.to(ratio), (~batch.desirable).to(ratio)
        drift = (batch.mismatched_logps - batch.mismatched_reference_logps).detach().to(ratio)
        point = (drift.sum() / size).clamp(min=0)  # a KL is never negative, its estimate may be
        gain = self.beta * (ratio - point) * (good - bad)
        losses = (self.desirable_weight * good + self.undesirable_weight * bad) * (-gain).sigmoid()
        implicit = self.beta * ratio.detach()
        return losses.sum() / batch.global_sequences, {
            "nll": Mean(-logps.detach().sum(), float(len(logps))),
            "kl": Mean(point * size, size),
            "implicit_reward/desirable": Mean((implicit * good).sum(), good.sum()),
            "implicit_reward/undesirable": Mean((implicit * bad).sum(), bad.sum()),
        }
