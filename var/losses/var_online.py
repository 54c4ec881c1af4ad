"""VAR on groups sampled from the policy itself, the future work of its paper (arXiv 2502.11026); ours.

What it aims at: a rollout's weighted SFT fits π_{k+1} ∝ π_k e^{r/λ}, a step of mirror descent from the policy that
sampled. n rollouts aim at π_ref e^{nr/λ}: λ is a step size, and how long one trains decides the temperature, where VAR
on the reference's answers aims at π_ref e^{r/λ} and stays. One optimiser step a rollout goes only part of the way: it
is a policy gradient with the advantage w − 1. Large rollout.steps refresh the sampling policy only so often; a run in
one rollout is VAR on the starting policy's answers. Its weights belong to the policy that sampled, so no ratio enters.
The softmax over a group holds the row itself, which shortens the step at small K and λ.
"""

from dataclasses import dataclass, field

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import Normalize, check_normalize, rollout_metrics, weighted_nll, zero_variance_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.training.rollout import Rollout
from var.utils.errors import UserError
from var.weights.estimators import Grouped
from var.weights.table import micro_batch_inputs


@dataclass(frozen=True, kw_only=True)
class VAROnline:
    """The weight is K · softmax of r/λ over a prompt's K responses.

    temperature: λ > 0, in reward units alone: a spread taken from the micro-batch would make a sequence's weight
    depend on its neighbours. drop_zero_variance: a group whose rewards are all equal gets the weight 0 and not 1, which
    is an SFT step on it; its tokens still count in the divisor. rollout: how often the policy is sampled.
    """

    temperature: float = 1.0
    drop_zero_variance: bool = True
    normalize: Normalize = "token"
    rollout: Rollout = field(default_factory=Rollout)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"loss.temperature is λ > 0, got {self.temperature}")
        check_normalize(self.normalize)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ROLLOUT, Need.REWARDS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Returns a scalar and this micro-batch's metrics."""
        groups = zero_variance_metrics(batch)
        grouped = Grouped(drop_zero_variance=self.drop_zero_variance)
        weights = grouped(micro_batch_inputs(batch), self.temperature).exp()
        loss, metrics = weighted_nll(logps, weights, batch, self.normalize)
        return loss, {**rollout_metrics(logps, batch), **groups, **metrics}
