"""Statistics of a policy's answers by subset: rewards, KL, lengths, diversity, and gains over an opponent."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from var.evaluate.diversity import describe_texts
from var.evaluate.lengths import control_length, describe_lengths, match_lengths
from var.rewards.scale import Scale
from var.utils.statistics import estimate_by_prompt, estimate_mean


def estimate(values: np.ndarray) -> dict[str, Any]:
    """Return the mean of values [P, S] with two standard errors: over the S seeds, and clustered by prompt."""
    seeds = values.mean(0)
    return {
        "mean": float(values.mean()),
        "se_seeds": estimate_mean(seeds).se,
        "se_prompts": estimate_by_prompt(values).se,
        "by_seed": seeds.tolist(),
    }


def average(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of the subsets' estimates; each subset counts once, as in the paper's tables."""
    by_seed = np.array([part["by_seed"] for part in parts]).mean(0)
    errors = [part["se_prompts"] for part in parts]
    return {
        "mean": float(by_seed.mean()),
        "se_seeds": estimate_mean(by_seed).se,
        "se_prompts": None if None in errors else float(np.sqrt(np.square(errors).sum()) / len(errors)),
        "by_seed": by_seed.tolist(),
    }


def measure(
    labels: np.ndarray, texts: list[list[str]], finished: np.ndarray, sizes: np.ndarray, values: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the statistics of each subset; labels [P] names each prompt's subset.

    texts, finished, sizes: [P, S] the answers, whether each ended before the token limit, and their tokens.
    values: rewards and KL by name, each [P, S]. A reward is also given as 100·sigmoid, which seems to be the scale of
    the paper's tables.
    """
    sigmoid = Scale(kind="sigmoid")
    scaled = {f"{name}_sigmoid": 100 * sigmoid(value) for name, value in values.items() if "reward" in name}
    result: dict[str, dict[str, Any]] = {}
    for name in np.unique(labels):
        inside = labels == name
        result[str(name)] = {
            "prompts": int(inside.sum()),
            **{key: estimate(value[inside]) for key, value in {**values, **scaled}.items()},
            "length": describe_lengths(sizes[inside].astype(float)),
            **describe_texts([texts[i] for i in np.flatnonzero(inside)], finished[inside]),
        }
    return result


def average_subsets(
    subsets: Mapping[str, Mapping[str, Any]], averages: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Return means over the subsets that `averages` names and that exist (`of`); `without` names the missing ones."""
    result = {}
    for name, members in averages.items():
        parts = {member: subsets[member] for member in members if member in subsets}
        if parts:
            first = next(iter(parts.values()))
            keys = [key for key, value in first.items() if isinstance(value, dict) and "by_seed" in value]
            result[name] = {
                "of": list(parts),
                "without": [member for member in members if member not in subsets],
                **{key: average([part[key] for part in parts.values()]) for key in keys},
            }
    return result


def compare(
    labels: np.ndarray, gain: np.ndarray, sizes: np.ndarray, opponent_sizes: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return each subset's paired gain in reward: unchanged, at equal length by regression, and at matched lengths.

    gain: [P, S] rewards minus the opponent's. sizes, opponent_sizes: [P, S] tokens.
    """
    result = {}
    for name in np.unique(labels):
        part, own, other = (values[labels == name].astype(float) for values in (gain, sizes, opponent_sizes))
        result[str(name)] = {
            "gain": estimate(part),
            "length_controlled": control_length(part, own - other),
            "matched_lengths": match_lengths(part, own, other),
        }
    return result
