"""Parts that several losses share."""

from typing import Literal

import torch
from torch import Tensor

from var.losses.base import Mean, Metrics
from var.models.packing import Packed
from var.utils.errors import UserError
from var.weights.groups import group_log_softmax, group_size, zero_variance
from var.weights.table import micro_batch_inputs

Normalize = Literal["token", "sequence"]


def weighted_nll(logps: Tensor, weights: Tensor, batch: Packed, normalize: Normalize) -> tuple[Tensor, Metrics]:
    """Σ_i w_i Σ_t −log π_θ(y_it) over the step's response tokens, or over its sequences.

    logps [N] nats; weights [B], unitless, no gradient. The divisor is the whole optimiser step's, so micro-batches
    and ranks add up. Returns the scalar share of this micro-batch and its metrics.
    """
    divisor = batch.global_tokens if normalize == "token" else batch.global_sequences
    weighted = weights.detach().to(logps.dtype)[batch.sequence] * logps
    metrics = {
        "nll": Mean(-logps.detach().sum(), float(len(logps))),
        "weight/mean": Mean(weights.sum(), float(len(weights))),
        "weight/square": Mean(weights.square().sum(), float(len(weights))),
    }
    return -weighted.sum() / divisor, metrics


def check_normalize(normalize: str) -> None:
    if normalize not in ("token", "sequence"):
        raise UserError(f"loss.normalize is token or sequence, got {normalize}")


def log_ratios(logps: Tensor, batch: Packed) -> Tensor:
    """[B] nats: log π_θ(y|x) − log π_ref(y|x), summed over response tokens."""
    return batch.sum_by_sequence(token_log_ratios(logps, batch))


def token_log_ratios(logps: Tensor, batch: Packed) -> Tensor:
    """[N] nats: log π_θ − log π_ref of each response token."""
    assert batch.reference_logps is not None
    return logps - batch.reference_logps.to(logps.dtype)


def pair_metrics(logps: Tensor, batch: Packed, implicit: Tensor) -> Metrics:
    """What a preference loss is watched by. implicit: [B] implicit rewards, better and worse alternating.

    Under DPO the log-probability of the chosen response usually falls too: the loss sees only the difference.
    """
    summed, implicit = batch.sum_by_sequence(logps.detach()), implicit.detach()
    pairs = len(batch) / 2
    margin = implicit[0::2] - implicit[1::2]
    return {
        "nll": Mean(-logps.detach().sum(), float(len(logps))),
        "logps/chosen": Mean(summed[0::2].sum(), pairs),
        "logps/rejected": Mean(summed[1::2].sum(), pairs),
        "implicit_reward/margin": Mean(margin.sum(), pairs),
        "implicit_reward/accuracy": Mean((margin > 0).to(margin).sum(), pairs),
    }


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Metrics]:
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A) (Eq. 7), ρ = exp(log_ratio); of tokens or of sequences.

    log_ratio: nats, π_θ over the policy that sampled; advantages: no gradient. Both [n]. Returns [n] and metrics:
    clipped is where the clip decides, and the gradient is 0.
    """
    ratio = log_ratio.exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    number = float(len(ratio))
    return -torch.minimum(free, bounded), {
        "ratio/mean": Mean(ratio.detach().sum(), number),
        "ratio/clipped": Mean((bounded < free).sum(), number),
    }


def kl_estimate(logps: Tensor, batch: Packed) -> Tensor:
    """[N] e^d − d − 1 ≥ 0, d = log π_ref − log π_θ: unbiased for KL(π_θ ‖ π_ref) where π_θ samples (k3)."""
    assert batch.reference_logps is not None
    d = batch.reference_logps.to(logps.dtype) - logps
    return d.expm1() - d  # not exp(d) − 1 − d, which is all rounding where the policy is still close


def rollout_metrics(logps: Tensor, batch: Packed) -> Metrics:
    """What every loss on sampled responses is watched by."""
    assert batch.rewards is not None
    metrics = {
        "nll": Mean(-logps.detach().sum(), float(len(logps))),
        "reward/mean": Mean(batch.rewards.sum(), float(len(batch))),
    }
    if batch.reference_logps is not None:
        metrics["kl"] = Mean(kl_estimate(logps.detach(), batch).sum(), float(len(logps)))
    return metrics


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """[B] → [B]: the sum over the sequences of the same prompt."""
    return values.new_zeros(len(values)).index_add(0, group, values)[group]


def zero_variance_metrics(batch: Packed) -> Metrics:
    """The share of groups whose rewards are all equal: they say nothing. A group of one never does, and is an error."""
    size = group_size(batch.group)
    if (size < 2).any():
        raise UserError(
            "this loss compares the responses to one prompt, and generate.responses=1 leaves nothing to compare; "
            "set generate.responses to 2 or more"
        )
    silent = zero_variance(micro_batch_inputs(batch))
    return {"groups/without_signal": Mean((silent / size).sum(), float(batch.group.max()) + 1)}


Ratio = Literal["sequence", "token", "none"]


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


def nonnegative_rewards(batch: Packed) -> Tensor:
    """[B] rewards, ≥ 0: with a negative weight π_θ(y|x) → 0 would send the loss to −∞."""
    assert batch.rewards is not None
    rewards = batch.rewards.detach()
    if (lowest := float(rewards.min())) < 0:
        raise UserError(
            f"this loss weighs responses by their rewards, and one is {lowest:.4g}; weights must not be negative: set "
            "reward_scale=sigmoid"
        )
    return rewards


def response_metrics(logps: Tensor, batch: Packed) -> Metrics:
    """nll of a token, and log π_θ of a whole response: its fall shows answers being pushed down."""
    total = logps.detach().sum()
    return {"nll": Mean(-total, float(len(logps))), "logps/sequence": Mean(total, float(len(batch)))}


def reward_softmax(batch: Packed, temperature: float) -> Tensor:
    """[B] float64: softmax of r/α over the responses of each prompt, no gradient."""
    assert batch.rewards is not None
    return group_log_softmax(batch.rewards.double() / temperature, batch.group).exp()


def group_metrics(logps: Tensor, batch: Packed, implicit: Tensor, target: Tensor) -> Metrics:
    """implicit, target: [B]. The mean implicit reward falls below 0 where the loss lowers all responses; the other
    weighs responses by the target."""
    groups, implicit = float(batch.group.max() + 1), implicit.detach()
    return {
        "nll": Mean(-logps.detach().sum(), float(len(logps))),
        "implicit_reward/mean": Mean(implicit.sum(), float(len(implicit))),
        "implicit_reward/target": Mean((target * implicit).sum(), groups),
    }
