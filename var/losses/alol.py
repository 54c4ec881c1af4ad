"""A-LoL and its sequence, reference-free and KL forms (Baheti et al., "Leftover Lunch", arXiv 2305.14718; their code).

A = R − V(x), where V is the reference's expected reward (`var/annotate/advantages.py`). Unlike PPO's, the clip bounds
the detached coefficient and never stops the gradient. One thing differs from their code: whether A is clamped to A⁺ is
a setting.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import Ratio, check_ratio, importance_weighted_nll, token_log_ratios
from var.models.packing import Packed
from var.requirements import Advantages, ReferenceLogps, Requirement, Rewards, ValueFit
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ALoL:
    """Advantage times clipped ratio times NLL."""

    value: ValueFit
    """How V(x) is fitted."""
    ratio: Ratio = "sequence"
    """ρ = π_θ/π_ref of the whole `sequence`, of each `token`, or 1 (`none`)."""
    clip: float | None = 0.9
    """ε > 0 holds ρ within 1 ± ε; None does not clip."""
    beta: float = 0.0
    """β ≥ 0 adds β(log π_θ − log π_ref) on the data; only with ratio none. It makes the coefficient A⁺ − β, so
    responses of A < β become less likely, without bound.
    """
    clamp: bool = True
    """Whether A is replaced by A⁺ = max(A, 0)."""
    draw: Literal["all", "uniform", "priority"] = "priority"
    """Which responses train: `all`; `uniform`, each of A > 0 once; or `priority`, draws ∝ A⁺ with replacement. The loss
    still holds A, so under `priority` responses count by A².
    """

    def __post_init__(self) -> None:
        check_ratio(self.ratio, self.clip)
        if not self.beta >= 0 or (self.beta and self.ratio != "none"):
            raise UserError("loss.beta must be at least 0, and 0 unless loss.ratio=none")
        if self.draw not in ("all", "uniform", "priority"):
            raise UserError(f"loss.draw must be all, uniform or priority, got {self.draw}")
        if self.draw != "all" and not self.clamp:
            raise UserError(f"loss.clamp=false has no effect with loss.draw={self.draw}, which draws only A > 0")

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """Rewards and advantages, and the reference if ρ or the KL term uses it."""
        reference = (ReferenceLogps(),) if self.ratio != "none" or self.beta > 0 else ()
        return (Rewards(), Advantages(value=self.value, draw=self.draw), *reference)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch, divided by the step's sequences, and its metrics."""
        assert batch.advantages is not None
        advantages = batch.advantages.clamp(min=0) if self.clamp else batch.advantages
        loss, metrics = importance_weighted_nll(logps, advantages, batch, self.ratio, self.clip)
        if self.beta:
            loss = loss + self.beta * token_log_ratios(logps, batch).sum() / batch.global_sequences
        metrics["advantage/positive"] = Mean((batch.advantages > 0).to(logps).sum(), float(len(batch)))
        return loss, metrics
