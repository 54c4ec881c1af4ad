"""R-LoL, reward times clipped ratio times NLL (Baheti et al., arXiv 2305.14718; their code). The base of A-LoL."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from var.losses.dpo import token_log_ratios
from var.losses.wbc import response_metrics, weighing_rewards
from var.losses.weighted import Mean, Metrics
from var.needs import Need
from var.packing import Packed
from var.problems import UserError

Ratio = Literal["sequence", "token", "none"]


@dataclass(frozen=True, kw_only=True)
class RLoL:
    """ratio: ρ = π_θ/π_ref of a whole sequence, or of each token. clip: ε > 0, ρ within 1 ± ε; None: as it is.

    Rewards must not be negative: reward_scale brings them there.
    """

    ratio: Ratio = "sequence"
    clip: float | None = 0.9

    def __post_init__(self) -> None:
        if self.ratio == "none":
            raise UserError("loss.ratio is sequence or token here; without a ratio this is loss=wbc")
        check_ratio(self.ratio, self.clip)

    rewards_weigh = True  # see weighing_rewards; the data module refuses negative ones ahead

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Mean over the step's sequences."""
        rewards = weighing_rewards(batch)
        loss, metrics = importance_weighted_nll(logps, rewards, batch, self.ratio, self.clip)
        return loss, {**metrics, "weight/mean": Mean(rewards.sum(), float(len(rewards)))}


def importance_weighted_nll(
    logps: Tensor, coefficients: Tensor, batch: Packed, ratio: Ratio, clip: float | None
) -> tuple[Tensor, Metrics]:
    """Σ_i c_i Σ_t −clip(ρ) log π_θ(y_it) over the step's sequences; c and ρ hold no gradient.

    logps [N] nats; coefficients [B]. Returns this micro-batch's share and its metrics, ρ after the clip.
    """
    metrics = response_metrics(logps, batch)
    weights = coefficients.detach().to(logps.dtype)[batch.sequence]
    if ratio != "none":
        logs = token_log_ratios(logps, batch).detach()
        raw = (batch.sum_by_sequence(logs) if ratio == "sequence" else logs).exp()
        rho = raw if clip is None else raw.clamp(1 - clip, 1 + clip)
        metrics["ratio/mean"] = Mean(rho.sum(), float(len(rho)))
        metrics["ratio/clipped"] = Mean((rho != raw).to(rho).sum(), float(len(rho)))
        rho = rho[batch.sequence] if ratio == "sequence" else rho
        weights = torch.where(weights == 0, 0.0, weights * rho)  # 0 beside an unclipped ratio that overflows
    return -(weights * logps).sum() / batch.global_sequences, metrics


def check_ratio(ratio: str, clip: float | None) -> None:
    if ratio not in ("sequence", "token", "none") or (clip is not None and (not clip > 0 or ratio == "none")):
        raise UserError("loss.ratio is sequence, token or none; loss.clip is ε > 0, or null, as it is with ratio none")
