"""Trajectory balance on a prompt's responses, and its α-divergences (Fawkes and Hartford, arXiv 2605.15417).

Δ = log π_θ/π_ref − r/λ is equal for all responses to a prompt only if π_θ is RLHF's optimum π_ref exp(r/λ)/Z(x). Then
it is −log Z(x). The loss of a group measures how unequal its Δ are, so log Z(x) is not needed. With κ = 1 − α it is

    (log mean exp(−κΔ) + κ mean Δ) / κ²,    and half the variance of Δ in the limit κ → 0.

In large groups of the policy's own responses, the gradient is that of an α-divergence of the policy from the optimum,
up to a positive factor. α = 1 is the reverse KL, the objective of RLHF, and the loss is the log-variance loss (Richter
et al., arXiv 2010.10436). α = 0 is the forward KL, the objective of VAR: the gradient weights −∇log π_θ by
softmax(r/λ − log π_θ/π_ref) − 1/K, which are the weights of `var_grouped` for the policy as it is now, minus those of
SFT. Responses may come from any policy: the optimum does not depend on it. For α < 1 one thing differs from the paper,
which subtracts the mean of Δ in place of log Z(x): here the constant that makes the loss smallest is subtracted.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import group_metrics, log_ratios, reward_softmax
from var.models.packing import Packed
from var.requirements import Groups, ReferenceLogps, Requirement, Rewards
from var.utils.errors import UserError
from var.weights.groups import group_logsumexp, group_size, group_sum


@dataclass(frozen=True, kw_only=True)
class TrajectoryBalance:
    """The spread of log π_θ/π_ref − r/λ within groups."""

    temperature: float = 1.0
    """λ > 0, in units of the reward."""
    alpha: float = 1.0
    """α of the divergence, in [0, 1]: 1 is the reverse KL, 0 the forward KL."""

    requires: ClassVar[tuple[Requirement, ...]] = (Groups(), Rewards(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.alpha <= 1:
            raise UserError("loss.temperature must be above 0 and loss.alpha in [0, 1]")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's groups, divided by the step's groups, and its metrics."""
        assert batch.rewards is not None
        ratio = log_ratios(logps, batch)
        count = group_size(batch.group)
        difference = ratio.double() - batch.rewards.double() / self.temperature  # κ² would magnify float32's rounding
        difference = difference - group_sum(difference, batch.group) / count
        squares = difference.square() / 2
        kappa = 1 - self.alpha
        losses = squares if kappa == 0 else (group_logsumexp(-kappa * difference, batch.group) - count.log()) / kappa**2
        metrics = group_metrics(logps, batch, self.temperature * ratio, reward_softmax(batch, self.temperature))
        metrics["balance/variance"] = Mean(2 * (squares.detach() / count).sum(), float(len(batch.group_sizes)))
        return (losses / count).sum().to(logps.dtype) / batch.global_groups, metrics
