"""KTO: each response alone, desirable or not, compared with a reference point (Ethayarajh et al., arXiv 2402.01306).

z0, the policy's KL from the reference, is estimated as in the paper from responses that answer other prompts, within
each micro-batch. Like VAR's in-batch weights, it depends on the size of the micro-batch. TRL averages it
over ranks too.
"""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import log_ratios
from var.models.packing import Packed
from var.requirements import Desirable, MismatchedLogps, ReferenceLogps, Requirement, Rewards
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Prospect-theoretic loss on desirable and undesirable responses."""

    beta: float = 0.1
    """β > 0, the KL coefficient."""
    desirable_weight: float = 1.0
    """λ_D > 0. The paper has λ_D n_D / (λ_U n_U) in [1, 3/2]."""
    undesirable_weight: float = 1.0
    """λ_U > 0."""
    threshold: float | None = None
    """A reward above it is desirable, in units of the reward. None: the better response of a pair is desirable."""

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.desirable_weight > 0 or not self.undesirable_weight > 0:
            raise UserError("loss.beta, loss.desirable_weight and loss.undesirable_weight must be above 0")

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """Labels, the reference, and rewards if a threshold on them gives the labels."""
        rewards = (Rewards(),) if self.threshold is not None else ()
        return (*rewards, Desirable(threshold=self.threshold), ReferenceLogps(), MismatchedLogps())

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's sequences, divided by the step's sequences, and its metrics."""
        assert batch.desirable is not None
        assert batch.mismatched_logps is not None
        assert batch.mismatched_reference_logps is not None
        ratio = log_ratios(logps, batch)
        size, good, bad = float(len(batch)), batch.desirable.to(ratio), (~batch.desirable).to(ratio)
        drift = (batch.mismatched_logps - batch.mismatched_reference_logps).detach().to(ratio)
        point = (drift.sum() / size).clamp(min=0)  # a KL is never negative, but its estimate can be
        gain = self.beta * (ratio - point) * (good - bad)
        losses = (self.desirable_weight * good + self.undesirable_weight * bad) * (-gain).sigmoid()
        implicit = self.beta * ratio.detach()
        return losses.sum() / batch.global_sequences, {
            "nll": Mean(-logps.detach().sum(), float(len(logps))),
            "kl": Mean(point * size, size),
            "implicit_reward/desirable": Mean((implicit * good).sum(), good.sum()),
            "implicit_reward/undesirable": Mean((implicit * bad).sum(), bad.sum()),
        }
