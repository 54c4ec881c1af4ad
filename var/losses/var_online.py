"""VAR on groups sampled from the policy itself, the future work of its paper (arXiv 2502.11026). This form is ours.

A rollout's weighted SFT fits π_{k+1} ∝ π_k e^{r/λ}, a step of mirror descent from the policy that sampled. n rollouts
aim at π_ref e^{nr/λ}. So λ is a step size, and the training time decides the temperature. VAR on the reference's
responses aims at π_ref e^{r/λ} and stays there. One optimizer step per rollout goes only part of the way: it is a
policy gradient with the advantage w − 1. With a large `rollout.steps` the sampling policy is refreshed less often. With
a single rollout for the complete run, this is VAR on the initial policy's responses. The weights are relative to the
sampling policy, so no importance ratio is needed. The softmax over a group contains the response itself, which shortens
the step at small K and λ.

A baseline subtracts the mean weight of a group, so that responses with a smaller weight become less likely. Without it
no response does. On the policy's own responses ∇log π_θ is 0 on average, so the baseline does not change the expected
gradient of a rollout's first step, if normalize=sequence and drop_zero_variance=false. A divisor of tokens depends on
the responses' lengths, and groups that are kept for their rewards are not a fair sample. In later steps on the same
rollout bad responses become still less likely, and the loss has no lower bound. With a baseline, a group whose rewards
are all equal has weights of 0, whether it is dropped or not.
"""

from dataclasses import dataclass, field

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import Normalize, check_normalize, rollout_metrics, weighted_nll, zero_variance_metrics
from var.models.packing import Packed
from var.requirements import Requirement, Rewards, Rollout
from var.utils.errors import UserError
from var.weights.estimators import Grouped
from var.weights.groups import group_size, group_sum
from var.weights.inputs import micro_batch_inputs


@dataclass(frozen=True, kw_only=True)
class VAROnline:
    """Weighted NLL of sampled responses. The weight is K · softmax of r/λ over a prompt's K responses."""

    temperature: float = 1.0
    """λ > 0, in units of the reward. A spread taken from the micro-batch would make weights depend on neighbors."""
    drop_zero_variance: bool = True
    """Whether a group whose rewards are all equal has weight 0 in place of 1, which is a step of SFT on it. Its tokens
    still count in the divisor.
    """
    baseline: bool = False
    """Whether the mean weight of the group is subtracted from each weight."""
    normalize: Normalize = "token"
    """`token` divides by the response tokens of the optimizer step, `sequence` by its sequences."""
    rollout: Rollout = field(default_factory=Rollout)
    """How often the policy is sampled."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"loss.temperature must be above 0, got {self.temperature}")
        check_normalize(self.normalize)

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """Rollouts with rewards."""
        return (self.rollout, Rewards())

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the loss of this micro-batch and its metrics."""
        groups = zero_variance_metrics(batch)
        grouped = Grouped(drop_zero_variance=self.drop_zero_variance)
        weights = grouped(micro_batch_inputs(batch), self.temperature).exp()
        loss, metrics = weighted_nll(logps, weights, batch, self.normalize)
        if self.baseline:
            mean = group_sum(weights, batch.group) / group_size(batch.group)
            loss = loss - weighted_nll(logps, mean, batch, self.normalize)[0]
        return loss, {**rollout_metrics(logps, batch), **groups, **metrics}
