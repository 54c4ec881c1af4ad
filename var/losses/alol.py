"""A-LoL, its sequence, reference-free and KL forms (Baheti et al., "Leftover Lunch", arXiv 2305.14718; their code).

A = R − V(x), V the reference's expected reward (var/annotate/value_head.py). Unlike PPO's, the clip bounds the detached
coefficient and never stops the gradient. Where we leave their code: whether A is held to A⁺ is a setting.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from var.annotate.value_head import ValueHead
from var.losses.base import Mean, Metrics
from var.losses.common import Ratio, check_ratio, importance_weighted_nll, token_log_ratios
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ALoL:
    """ratio: ρ = π_θ/π_ref of a whole sequence, of each token, or 1. clip: ε > 0, ρ within 1 ± ε; None: as it is.
    beta: β ≥ 0 adds β(log π_θ − log π_ref) on the data, with ratio none: all it does is to make the coefficient
    A⁺ − β, which pushes answers of A < β down, without bound. clamp: A⁺ = max(A, 0); else A as it is.
    draw: rows that train: `all`; `uniform`, those of A > 0; `priority`, ∝ A⁺ with replacement. The data module draws,
    the loss still holds A, so there A² weighs. value: V.
    """

    value: ValueHead
    ratio: Ratio = "sequence"
    clip: float | None = 0.9
    beta: float = 0.0
    clamp: bool = True
    draw: Literal["all", "uniform", "priority"] = "priority"

    def __post_init__(self) -> None:
        check_ratio(self.ratio, self.clip)
        if not self.beta >= 0 or (self.beta and self.ratio != "none"):
            raise UserError("loss.beta is β ≥ 0, and 0 unless loss.ratio=none")
        if self.draw not in ("all", "uniform", "priority"):
            raise UserError(f"loss.draw is all, uniform or priority, got {self.draw}")
        if self.draw != "all" and not self.clamp:
            raise UserError(f"loss.clamp=false does nothing beside loss.draw={self.draw}, which draws A > 0 alone")

    @property
    def needs(self) -> frozenset[Need]:
        reference = self.ratio != "none" or self.beta > 0
        return frozenset({Need.ADVANTAGES} | ({Need.REFERENCE_LOGPS} if reference else set()))

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Mean over the step's sequences."""
        assert batch.advantages is not None
        advantages = batch.advantages.clamp(min=0) if self.clamp else batch.advantages
        loss, metrics = importance_weighted_nll(logps, advantages, batch, self.ratio, self.clip)
        if self.beta:
            loss = loss + self.beta * token_log_ratios(logps, batch).sum() / batch.global_sequences
        metrics["advantage/positive"] = Mean((batch.advantages > 0).to(logps).sum(), float(len(batch)))
        return loss, metrics
