"""Parts that several losses share. Shapes: N response tokens, B sequences of a micro-batch."""

import math
from typing import Literal

import torch
from torch import Tensor

from var.losses.base import Mean, Metrics
from var.models.packing import Packed
from var.utils.errors import UserError
from var.weights.groups import group_log_softmax, group_size, zero_variance

Normalize = Literal["token", "sequence"]
Ratio = Literal["sequence", "token", "none"]


# Weighted likelihood: SFT, VAR, A-LoL and its baselines.


def weighted_nll(logps: Tensor, weights: Tensor, batch: Packed, normalize: Normalize) -> tuple[Tensor, Metrics]:
    """Return Σ_i w_i Σ_t −log π_θ(y_it) over the step's response tokens or sequences, and its metrics.

    Args:
        logps: [N] nats, log π_θ of each response token.
        weights: [B], unitless. No gradient flows through them.
        batch: the micro-batch.
        normalize: `token` divides by the step's response tokens, `sequence` by its sequences.
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
    """Raise UserError unless `normalize` is one of `Normalize`."""
    if normalize not in ("token", "sequence"):
        raise UserError(f"loss.normalize must be token or sequence, got {normalize}")


def importance_weighted_nll(
    logps: Tensor, coefficients: Tensor, batch: Packed, ratio: Ratio, clip: float | None
) -> tuple[Tensor, Metrics]:
    """Return Σ_i c_i Σ_t −clip(ρ) log π_θ(y_it) over the step's sequences, and its metrics.

    Args:
        logps: [N] nats, log π_θ of each response token.
        coefficients: [B], c. No gradient flows through c or ρ.
        batch: the micro-batch.
        ratio: ρ = π_θ/π_ref of the whole `sequence`, of each `token`, or 1 (`none`).
        clip: ε > 0 holds ρ within 1 ± ε; None does not clip.
    """
    metrics = response_metrics(logps, batch)
    weights = coefficients.detach().to(logps.dtype)[batch.sequence]
    if ratio != "none":
        log_ratio = token_log_ratios(logps, batch).detach()
        log_ratio = batch.sum_by_sequence(log_ratio) if ratio == "sequence" else log_ratio
        largest = weights.abs().max() * logps.detach().abs().max().clamp(min=1) * len(logps)
        raw = cap_exponents(log_ratio, largest).exp()
        rho = raw if clip is None else raw.clamp(1 - clip, 1 + clip)
        metrics["ratio/mean"] = Mean(rho.sum(), float(len(rho)))
        metrics["ratio/clipped"] = Mean((rho != raw).to(rho).sum(), float(len(rho)))
        rho = rho[batch.sequence] if ratio == "sequence" else rho
        weights = weights * rho
    return -(weights * logps).sum() / batch.global_sequences, metrics


def check_ratio(ratio: str, clip: float | None) -> None:
    """Raise UserError unless ratio and clip fit each other."""
    if ratio not in ("sequence", "token", "none") or (clip is not None and (not clip > 0 or ratio == "none")):
        raise UserError(
            "loss.ratio must be sequence, token or none. loss.clip must be above 0 or null. With loss.ratio=none "
            "it must be null."
        )


def response_metrics(logps: Tensor, batch: Packed) -> Metrics:
    """Return the NLL per token, and log π_θ per response, which falls when responses are made less likely."""
    total = logps.detach().sum()
    return {"nll": Mean(-total, float(len(logps))), "logps/sequence": Mean(total, float(len(batch)))}


# Log-ratios to the reference, pairs and groups.


def log_ratios(logps: Tensor, batch: Packed) -> Tensor:
    """Return [B] nats: log π_θ(y|x) − log π_ref(y|x), summed over response tokens."""
    return batch.sum_by_sequence(token_log_ratios(logps, batch))


def token_log_ratios(logps: Tensor, batch: Packed) -> Tensor:
    """Return [N] nats: log π_θ − log π_ref of each response token."""
    assert batch.reference_logps is not None
    return logps - batch.reference_logps.to(logps.dtype)


def pair_metrics(logps: Tensor, batch: Packed, implicit: Tensor) -> Metrics:
    """Return the metrics of a preference loss.

    Under DPO the log-probability of the chosen response usually falls too: the loss sees only the difference.

    Args:
        logps: [N] nats, log π_θ of each response token.
        batch: the micro-batch; its sequences alternate, better and worse.
        implicit: [B] implicit rewards.
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


def reward_softmax(batch: Packed, temperature: float) -> Tensor:
    """Return [B] float64 without a gradient: the softmax of r/α over the responses to each prompt."""
    assert batch.rewards is not None
    return group_log_softmax(batch.rewards.double() / temperature, batch.group).exp()


def group_metrics(logps: Tensor, batch: Packed, implicit: Tensor, target: Tensor) -> Metrics:
    """Return the metrics of a loss on groups.

    `implicit_reward/mean` is the mean over responses; it falls below 0 when the loss makes all responses less likely.
    `implicit_reward/target` weights the responses of a group by the target.

    Args:
        logps: [N] nats, log π_θ of each response token.
        batch: the micro-batch.
        implicit: [B] implicit rewards.
        target: [B] target probabilities within each group.
    """
    groups, implicit = float(len(batch.group_sizes)), implicit.detach()
    return {
        "nll": Mean(-logps.detach().sum(), float(len(logps))),
        "implicit_reward/mean": Mean(implicit.sum(), float(len(implicit))),
        "implicit_reward/target": Mean((target * implicit).sum(), groups),
    }


# Responses that the policy samples while it trains.


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Metrics]:
    """Return −min(ρA, clip(ρ, 1 − low, 1 + high) A), ρ = exp(log_ratio), and its metrics (PPO, Eq. 7).

    `ratio/clipped` counts where the clip decides and the gradient is 0.

    Args:
        log_ratio: [n] nats, the policy over the policy that sampled, per token or per sequence.
        advantages: [n] without a gradient.
        low: the ratio is clipped at 1 − low.
        high: the ratio is clipped at 1 + high.
    """
    ratio = cap_exponents(log_ratio, advantages).exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    count = float(len(ratio))
    return -torch.minimum(free, bounded), {
        "ratio/mean": Mean(ratio.detach().sum(), count),
        "ratio/clipped": Mean((bounded < free).sum(), count),
    }


def cap_exponents(values: Tensor, factors: Tensor | float = 1.0) -> Tensor:
    """Return the values, lowered so that `factors` times exp(values) is finite, with the gradient of the values.

    An infinite ratio would give NaN where it is multiplied by 0: by an advantage of 0, or by the gradient 0 of a clip.
    The products are so far below the largest number that a sum of several products per value is finite too.

    Args:
        values: the exponents, which are finite.
        factors: what the exponentials are multiplied by, in the shape of the values or one number.
    """
    number, precision = values.detach(), torch.finfo(values.dtype)
    room = math.log(precision.max) - math.log(4 * max(1, len(values)))
    limits: Tensor | float
    if isinstance(factors, Tensor):
        limits = room - factors.detach().abs().clamp(min=1).double().log()
        limits = (limits * (1 - precision.eps)).to(values.dtype)  # its rounding stays finite
    else:  # a number is not copied to the device, for which the host would wait
        limits = (room - math.log(max(1.0, abs(factors)))) * (1 - precision.eps)
    return torch.where(number > limits, limits + (values - number), values)


def kl_estimate(logps: Tensor, batch: Packed, factor: float = 1.0) -> Tensor:
    """Return [N] e^d − d − 1 ≥ 0, d = log π_ref − log π_θ, unbiased for KL(π_θ ‖ π_ref) if π_θ samples (k3).

    `factor` is what the loss multiplies it by; see `cap_exponents`.
    """
    assert batch.reference_logps is not None
    d = batch.reference_logps.to(logps.dtype) - logps
    # exp(d) − 1 − d would be all rounding while the policy is close to the reference
    return cap_exponents(d, factor).expm1() - d


def rollout_metrics(logps: Tensor, batch: Packed) -> Metrics:
    """Return the metrics of every loss on sampled responses."""
    assert batch.rewards is not None
    metrics = {
        "nll": Mean(-logps.detach().sum(), float(len(logps))),
        "reward/mean": Mean(batch.rewards.sum(), float(len(batch))),
    }
    if batch.reference_logps is not None:
        metrics["kl"] = Mean(kl_estimate(logps.detach(), batch).sum(), float(len(logps)))
    return metrics


def zero_variance_metrics(batch: Packed) -> Metrics:
    """Return the fraction of groups whose rewards are all equal. Raise UserError on a group of one response."""
    assert batch.rewards is not None
    if min(batch.group_sizes) < 2:
        raise UserError(
            "generate.responses=1: this loss compares the responses to a prompt, and there is nothing to compare. Set "
            "generate.responses to 2 or more."
        )
    equal = zero_variance(batch.rewards.double(), batch.group)
    return {"groups/zero_variance": Mean((equal / group_size(batch.group)).sum(), float(len(batch.group_sizes)))}
