"""GRPO, Dr. GRPO and DAPO's loss: one class with three files of settings.

GRPO is by Shao et al., arXiv 2402.03300, Eq. 3 and 4; Dr. GRPO by Liu et al., arXiv 2503.20783; DAPO's loss by Yu et
al., arXiv 2503.14476, Eq. 8.

The value of β's term estimates KL(π_θ ‖ π_ref). Its gradient where the ratio is 1 is that of KL(π_ref ‖ π_θ), so the
fixed point is not π* (measured in experiments/tabular; RLOO's and PPO's fixed point is π*). The KL term is the paper's;
TRL multiplies it by the ratio. DAPO's loss divides by the tokens of the step, where its paper writes those of a group.
Its dynamic sampling, which replaces zero-variance groups, and its penalty on long responses are not implemented.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import clipped_surrogate, kl_estimate, rollout_metrics, zero_variance_metrics
from var.models.packing import Packed
from var.requirements import OldLogps, ReferenceLogps, Requirement, Rewards, Rollout
from var.utils.errors import UserError
from var.weights.groups import group_size, group_sum


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Clipped policy gradient with advantages within the group of a prompt's sampled responses."""

    beta: float = 0.04
    """β ≥ 0, the KL coefficient; 0 needs no reference."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 − clip_low, in (0, 1]. If each rollout is one step, the ratio is 1."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high, above 0."""
    scale: Literal["std", "none"] = "std"
    """Whether a group's advantages are divided by the standard deviation of its rewards."""
    normalize: Literal["sequence", "token", "constant"] = "sequence"
    """`sequence`: mean over a response's tokens, then over the step's sequences. `token`: over the step's tokens.
    `constant`: over the step's sequences times `length`.
    """
    length: int | None = None
    """Tokens, with normalize=constant only."""
    rollout: Rollout = field(default_factory=Rollout)
    """How often the policy is sampled."""

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not 0 < self.clip_low <= 1 or not self.clip_high > 0:
            raise UserError("loss.beta must be at least 0, loss.clip_low in (0, 1] and loss.clip_high above 0")
        if self.scale not in ("std", "none") or self.normalize not in ("sequence", "token", "constant"):
            raise UserError("loss.scale must be std or none, and loss.normalize sequence, token or constant")
        if (self.normalize == "constant") != (self.length is not None) or (self.length is not None and self.length < 1):
            raise UserError(
                "loss.length is the divisor of loss.normalize=constant. Set it to at least 1 there (for example "
                "generate.max_new_tokens), and otherwise to null."
            )

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """Rollouts with rewards and the sampling policy's numbers, and the reference for the KL term."""
        reference = (ReferenceLogps(),) if self.beta else ()
        return (self.rollout, Rewards(), OldLogps(rollout=self.rollout), *reference)

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Return [B]: r minus the group's mean, over its standard deviation (K − 1 in the divisor) plus 1e-4.

        Args:
            rewards: [B].
            group: [B] int, the prompt of each sequence.
        """
        centered = rewards - group_sum(rewards, group) / (size := group_size(group))
        if self.scale == "none":
            return centered
        return centered / ((group_sum(centered.square(), group) / (size - 1)).sqrt() + 1e-4)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the loss of this micro-batch and its metrics."""
        assert batch.rewards is not None
        assert batch.old_logps is not None
        groups = zero_variance_metrics(batch)
        advantages = self.advantages(batch.rewards.double(), batch.group).to(logps.dtype)[batch.sequence]
        log_ratio = logps - batch.old_logps.to(logps.dtype)
        losses, ratios = clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high)
        if self.beta:
            losses = losses + self.beta * kl_estimate(logps, batch, self.beta)
        metrics = {**rollout_metrics(logps, batch), **groups, **ratios}
        if self.normalize == "sequence":
            return (batch.sum_by_sequence(losses) / batch.length).sum() / batch.global_sequences, metrics
        if self.length is not None:
            return losses.sum() / (batch.global_sequences * self.length), metrics
        return losses.sum() / batch.global_tokens, metrics
