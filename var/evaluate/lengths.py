"""Lengths of answers, and gains in reward at equal length; pure numpy.

A longer answer often scores higher for its length alone. A gain is therefore reported three times: without control, at
equal length by regression, and among pairs of similar length. Length is itself a consequence of training, so both
controls are descriptive and not causal. The idea is length-controlled AlpacaEval's (Dubois et al., arXiv 2404.04475),
which is logistic in verdicts. Here the reward keeps its own scale and the regression is least squares.
"""

import math
from typing import Any

import numpy as np

from var.utils.statistics import Estimate, estimate_by_prompt, estimate_mean, fit_ols

MIN_PROMPTS = 10  # the sandwich covariance is biased towards zero if there are few clusters


def describe_lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Return the mean (clustered by prompt), standard deviation, quantiles and maximum of lengths [P, S] in tokens."""
    flat = lengths.reshape(-1)
    quantiles = np.quantile(flat, [0.05, 0.25, 0.5, 0.75, 0.95])
    return {
        **estimate_by_prompt(lengths).to_json(),
        "sd": float(flat.std(ddof=1)) if flat.size > 1 else None,
        "quantiles": dict(zip(("5", "25", "50", "75", "95"), quantiles.tolist(), strict=True)),
        "longest": int(flat.max()),
    }


def control_length(reward_difference: np.ndarray, length_difference: np.ndarray) -> dict[str, Any]:
    """Return the gain in reward at equal length: the intercept of Δreward on Δlength, answer minus opponent, [P, S].

    Δlength is in units of its standard deviation, `unit`, and is not centered, because the intercept belongs to
    Δlength = 0. Standard errors are clustered by prompt. Pairs that are NaN (judge errors) are skipped and counted.
    `extrapolated` is true if all length differences have the same sign, so that the line leaves the data. If the gain
    is not identified, it is null and `reason` says why. The fit is linear: if rewards saturate in length, a few very
    long answers flatten the line, and `match_lengths` is the better guide.
    """
    finite = np.isfinite(reward_difference) & np.isfinite(length_difference)
    prompt = np.broadcast_to(np.arange(len(finite))[:, None], finite.shape)[finite]
    y, x = reward_difference[finite].astype(float), length_difference[finite].astype(float)
    prompts = len(np.unique(prompt))
    result: dict[str, Any] = {
        "pairs": len(y),
        "prompts": prompts,
        "skipped": reward_difference.size - len(y),
        "difference": estimate_mean(y, prompt).to_json(),
        "gain": None,
        "slope": None,
    }
    if prompts < MIN_PROMPTS:
        return {**result, "reason": f"{prompts} prompts; at least {MIN_PROMPTS} are needed"}
    if x.min() == x.max():
        reason = f"all pairs differ by {x[0]:g} tokens, so the effect of length cannot be separated from the gain"
        return {**result, "reason": reason}
    unit = float(x.std(ddof=1))
    scaled = x / unit
    coefficients, covariance = fit_ols(y, np.stack([np.ones_like(scaled), scaled], axis=1), prompt)
    gain, slope = (
        Estimate(float(mean), math.sqrt(max(variance, 0.0))).to_json()
        for mean, variance in zip(coefficients, np.diag(covariance), strict=True)
    )
    extrapolated = bool(x.min() > 0 or x.max() < 0)
    return {**result, "gain": gain, "slope": slope, "unit": unit, "extrapolated": extrapolated}


def match_lengths(
    reward_difference: np.ndarray, lengths: np.ndarray, opponent_lengths: np.ndarray, tolerance: float = 0.1
) -> dict[str, Any]:
    """Return the mean Δreward among pairs whose lengths differ by at most `tolerance` of the longer one; all [P, S].

    These pairs are selected by their outcome, so they may not represent all pairs; `pairs` is their number, `of` that
    of all. If they belong to too few prompts, the difference is null and `reason` says why.
    """
    near = np.abs(lengths - opponent_lengths) <= tolerance * np.maximum(lengths, opponent_lengths)
    matched = np.where(near, reward_difference, np.nan)
    finite = np.isfinite(matched)
    prompts = int(finite.any(axis=1).sum())
    result = {"tolerance": tolerance, "pairs": int(finite.sum()), "prompts": prompts, "of": int(finite.size)}
    if prompts < MIN_PROMPTS:
        reason = f"pairs of similar length belong to {prompts} prompts; at least {MIN_PROMPTS} are needed"
        return {**result, "difference": None, "reason": reason}
    return {**result, "difference": estimate_by_prompt(matched).to_json()}
