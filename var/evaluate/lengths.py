"""Lengths of answers, and what a difference in reward is worth once length is held fixed; pure numpy.

A longer answer often scores higher for its length alone, so a gain is told three times: as it is, at equal length by
regression, and among pairs of like length. Length is itself a consequence of training: neither of the two controls is
causal, and both are descriptions. The idea is length-controlled AlpacaEval's (Dubois et al., arXiv 2404.04475),
logistic on verdicts there; here the reward is on its own scale and the regression is least squares.
"""

import math
from typing import Any

import numpy as np

from var.utils.statistics import clustered_error, clustered_ols

FEWEST = 10  # prompts; the sandwich is biased towards zero where clusters are few


def distribution(lengths: np.ndarray) -> dict[str, Any]:
    """Mean with its standard error clustered by prompt, sd, quantiles and the longest, of lengths [P, S] in tokens."""
    flat = lengths.reshape(-1)
    quantiles = np.quantile(flat, [0.05, 0.25, 0.5, 0.75, 0.95])
    return {
        **estimate(lengths),
        "sd": float(flat.std(ddof=1)) if flat.size > 1 else None,
        "quantiles": dict(zip(("5", "25", "50", "75", "95"), quantiles.tolist(), strict=True)),
        "longest": int(flat.max()),
    }


def length_controlled(reward_difference: np.ndarray, length_difference: np.ndarray) -> dict[str, Any]:
    """The gain in reward at equal length: the intercept of Δreward on Δlength, answer less opponent, both [P, S].

    A line: where rewards saturate in length, a few very long answers flatten it, and `matched` is the better guide.
    unit: the sd of Δlength; slope is in reward a unit. Δ is not centred, since the intercept is meant at Δ = 0.
    Standard errors are clustered by prompt. Pairs that are NaN (a judge's error) are left out and counted.
    extrapolated: no pair is of equal length or on the other side of it, so the line is followed beyond the data.
    gain is null, with the reason, where it is not identified.
    """
    y, x, prompt = _pairs(reward_difference, length_difference)
    prompts = len(np.unique(prompt))
    left_out = reward_difference.size - len(y)
    facts: dict[str, Any] = {"pairs": len(y), "prompts": prompts, "left_out": left_out, "difference": _mean(y, prompt)}
    if prompts < FEWEST:
        return {**facts, "gain": None, "slope": None, "reason": f"{prompts} prompts; at least {FEWEST} are needed"}
    if x.min() == x.max():
        reason = f"all pairs differ by {x[0]:g} tokens, so nothing tells length from the rest"
        return {**facts, "gain": None, "slope": None, "reason": reason}
    unit = float(x.std(ddof=1))
    scaled = x / unit
    coefficients, covariance = clustered_ols(y, np.stack([np.ones_like(scaled), scaled], axis=1), prompt)
    gain, slope = (
        {"mean": float(coefficients[i]), "se": float(math.sqrt(max(covariance[i, i], 0.0)))} for i in range(2)
    )
    return {**facts, "gain": gain, "slope": slope, "unit": unit, "extrapolated": bool(x.min() > 0 or x.max() < 0)}


def matched(
    reward_difference: np.ndarray, lengths: np.ndarray, opponent_lengths: np.ndarray, tolerance: float = 0.1
) -> dict[str, Any]:
    """Mean Δreward among the pairs whose lengths differ by at most `tolerance` of the longer one; all [P, S].

    These pairs are chosen by their outcome, so they need not stand for the rest: `pairs` of `of` says how many there
    are. difference is null, with the reason, where they are of too few prompts.
    """
    near = np.abs(lengths - opponent_lengths) <= tolerance * np.maximum(lengths, opponent_lengths)
    y, _, prompt = _pairs(np.where(near, reward_difference, np.nan), lengths)
    prompts = len(np.unique(prompt))
    facts = {"tolerance": tolerance, "pairs": len(y), "prompts": prompts, "of": int(np.size(reward_difference))}
    if prompts < FEWEST:
        reason = f"pairs of like length are of {prompts} prompts; at least {FEWEST} are needed"
        return {**facts, "difference": None, "reason": reason}
    return {**facts, "difference": _mean(y, prompt)}


def estimate(values: np.ndarray) -> dict[str, float | None]:
    """Mean and standard error, clustered by prompt, of values [P, S]; NaN ones are left out. null where there are
    none, and no standard error of a single prompt."""
    y, _, prompt = _pairs(values, values)
    return _mean(y, prompt)


def _mean(y: np.ndarray, prompt: np.ndarray) -> dict[str, float | None]:
    return {"mean": float(y.mean()), "se": clustered_error(y, prompt)} if len(y) else {"mean": None, "se": None}


def _pairs(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is finite of both [P, S], flat, with the prompt of each."""
    prompt = np.broadcast_to(np.arange(y.shape[0])[:, None], y.shape)
    good = np.isfinite(y) & np.isfinite(x)
    return y[good].astype(float), x[good].astype(float), prompt[good]
