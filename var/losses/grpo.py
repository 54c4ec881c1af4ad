"""GRPO (Shao et al., arXiv 2402.03300, Eq. 3 and 4), Dr. GRPO (Liu et al., arXiv 2503.20783) and DAPO's loss (Yu et
al., arXiv 2503.14476, Eq. 8): one class, three files of settings.

β's term estimates KL(π_θ ‖ π_ref) in value; its gradient where the ratio is 1 is that of KL(π_ref ‖ π_θ), so that the
fixed point is not π* (var/tabular measures it; RLOO's and PPO's is).
DAPO divides by the tokens of the step, where the paper writes those of a group; its sampling until a group has a signal
and its penalty on long answers are not here. The KL term is the paper's, not multiplied by the ratio as in TRL.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import clipped_surrogate, group_sum, kl_estimate, rollout_metrics, zero_variance_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.training.rollout import Rollout
from var.utils.errors import UserError
from var.weights.groups import group_size


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """beta: β ≥ 0, the KL coefficient; 0 needs no reference. clip_low, clip_high: the ratio is clipped at 1 − clip_low,
    in (0, 1], and 1 + clip_high, > 0. scale: `std` divides a group's advantages by its deviation, `none` does not.
    normalize: `sequence`, mean over each response's tokens, then over the step's sequences; `token`, over the step's
    tokens; `constant`, over the step's sequences times length. length: tokens, with `constant` alone.
    rollout: how often the policy is sampled; where each rollout gives one step, the ratio is 1 and never clipped.
    """

    beta: float = 0.04
    clip_low: float = 0.2
    clip_high: float = 0.2
    scale: Literal["std", "none"] = "std"
    normalize: Literal["sequence", "token", "constant"] = "sequence"
    length: int | None = None
    rollout: Rollout = field(default_factory=Rollout)

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not 0 < self.clip_low <= 1 or not self.clip_high > 0:
            raise UserError("loss.beta is β ≥ 0, loss.clip_low lies in (0, 1] and loss.clip_high is > 0")
        if self.scale not in ("std", "none") or self.normalize not in ("sequence", "token", "constant"):
            raise UserError("loss.scale is std or none, and loss.normalize is sequence, token or constant")
        if (self.normalize == "constant") != (self.length is not None) or (self.length is not None and self.length < 1):
            raise UserError(
                "loss.length is the divisor of loss.normalize=constant, ≥ 1 there (generate.max_new_tokens, say), and "
                "null with any other"
            )

    @property
    def needs(self) -> frozenset[Need]:
        reference = {Need.REFERENCE_LOGPS} if self.beta else set()
        return frozenset({Need.ROLLOUT, Need.REWARDS, Need.OLD_LOGPS} | reference)

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        """[B] r less the group's mean, over its deviation (K − 1 in the divisor) plus 1e-4. rewards, group: [B]."""
        centred = rewards - group_sum(rewards, group) / (size := group_size(group))
        if self.scale == "none":
            return centred
        return centred / ((group_sum(centred.square(), group) / (size - 1)).sqrt() + 1e-4)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Returns a scalar and this micro-batch's metrics."""
        assert batch.rewards is not None
        assert batch.old_logps is not None
        groups = zero_variance_metrics(batch)
        advantages = self.advantages(batch.rewards.double(), batch.group).to(logps.dtype)[batch.sequence]
        log_ratio = logps - batch.old_logps.to(logps.dtype)
        losses, ratios = clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high)
        if self.beta:
            losses = losses + self.beta * kl_estimate(logps, batch)
        metrics = {**rollout_metrics(logps, batch), **groups, **ratios}
        if self.normalize == "sequence":
            return (batch.sum_by_sequence(losses) / batch.length).sum() / batch.global_sequences, metrics
        if self.length is not None:
            return losses.sum() / (batch.global_sequences * self.length), metrics
        return losses.sum() / batch.global_tokens, metrics
