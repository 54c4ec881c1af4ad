"""Length control: simulated worlds with a known gain, and the coverage of its interval."""

import math

import numpy as np
import pytest

from var.evaluate.lengths import control_length, describe_lengths, match_lengths


def world(seed: int = 0, prompts: int = 40, replicates: int = 3) -> tuple[np.random.Generator, np.ndarray]:
    """Return Δlength [P, S] in tokens, of both signs, with a mean far from 0."""
    draw = np.random.default_rng(seed)
    return draw, draw.normal(30, 40, (prompts, replicates)).round()


def test_description_by_hand():
    """Two prompts, [1, 3] and [5, 7]: means 2 and 6, so 4 ± |6 − 2|/2 = 2; sd of 1, 3, 5, 7 is √(20/3)."""
    assert describe_lengths(np.array([[1, 3], [5, 7]])) == {
        "mean": 4, "se": pytest.approx(2), "sd": pytest.approx(math.sqrt(20 / 3)), "longest": 7,
        "quantiles": pytest.approx({"5": 1.3, "25": 2.5, "50": 4.0, "75": 5.5, "95": 6.7}),
    }  # fmt: skip
    assert describe_lengths(np.array([[4]])) == {
        "mean": 4.0, "se": None, "sd": None, "quantiles": dict.fromkeys(("5", "25", "50", "75", "95"), 4.0),
        "longest": 4,
    }  # fmt: skip


def test_regression_recovers_known_gain_and_slope():
    """Δreward = 0.3 + 0.7·x exactly: gain 0.3, slope 0.7, no error; the plain difference is larger."""
    _, lengths = world()
    unit = lengths.std(ddof=1)
    result = control_length(0.3 + 0.7 * lengths / unit, lengths)
    assert result["unit"] == pytest.approx(unit)
    assert result["gain"] == pytest.approx({"mean": 0.3, "se": 0.0}, abs=1e-9)
    assert result["slope"] == pytest.approx({"mean": 0.7, "se": 0.0}, abs=1e-9)
    assert result["difference"]["mean"] > 0.5
    assert (result["pairs"], result["prompts"], result["skipped"]) == (120, 40, 0)
    assert not result["extrapolated"]


def test_reward_for_length_alone_is_no_gain():
    _, lengths = world()
    result = control_length(0.01 * lengths, lengths)
    assert result["gain"]["mean"] == pytest.approx(0, abs=1e-12)
    assert result["difference"]["mean"] == pytest.approx(0.01 * lengths.mean())
    assert result["slope"]["mean"] == pytest.approx(0.01 * result["unit"])


def test_matched_lengths_are_robust_to_very_long_answers():
    """Rewards that saturate, 0.5·tanh(Δ/40), are no gain. Two answers that are longer by 4,000 tokens flatten the line,
    so that nearly all of the mean difference looks like a gain; pairs of similar length are not affected."""
    _, lengths = world(5)
    longer = np.vstack([lengths, [[4000.0, 4000.0, 0.0]]])
    reward = 0.5 * np.tanh(longer / 40)
    result = control_length(reward, longer)
    assert result["gain"]["mean"] > 0.8 * result["difference"]["mean"] > 0.1
    matched = match_lengths(reward, 400 + longer, np.full(longer.shape, 400.0), tolerance=0.02)
    assert abs(matched["difference"]["mean"]) < 0.05


def test_interval_covers_the_known_gain():
    """400 worlds of 60 prompts × 3 whose prompts share half of the noise: 1.96 se cover slightly less than 95 %.

    Errors that ignore the prompt would be √2 too small, √(1 + 2·0.5), and cover 83 %.
    """
    covered = 0
    for seed in range(400):
        draw, lengths = world(seed, prompts=60)
        noise = draw.normal(size=(60, 1)) + draw.normal(size=(60, 3))
        gain = control_length(0.2 + 0.005 * lengths + noise, lengths)["gain"]
        covered += abs(gain["mean"] - 0.2) <= 1.96 * gain["se"]
    assert 0.91 < covered / 400 < 0.98


def test_pairs_without_a_number_are_skipped_and_counted():
    _, lengths = world()
    rewards = 0.3 + 0.0 * lengths
    rewards[0, 0] = rewards[3] = np.nan
    result = control_length(rewards, lengths)
    assert (result["pairs"], result["prompts"], result["skipped"]) == (116, 39, 4)
    assert result["gain"]["mean"] == pytest.approx(0.3)


def test_gain_that_is_not_identified_is_null_with_a_reason():
    _, lengths = world(prompts=9)
    result = control_length(lengths, lengths)
    assert (result["gain"], result["slope"], result["reason"]) == (None, None, "9 prompts; at least 10 are needed")
    result = control_length(np.ones((20, 2)), np.full((20, 2), 5.0))
    assert result["gain"] is None
    assert result["reason"].startswith("all pairs differ by 5 tokens, ")
    _, lengths = world()
    lengths[:30] = 0
    assert control_length(lengths, lengths)["gain"]["mean"] == pytest.approx(0)
    assert control_length(np.full((20, 2), np.nan), np.ones((20, 2)))["difference"] == {"mean": None, "se": None}


def test_extrapolation_is_reported():
    _, lengths = world()
    for difference, extrapolated in ((np.abs(lengths) + 1, True), (-np.abs(lengths) - 1, True),
                                     (np.abs(lengths) - np.abs(lengths).min(), False)):  # fmt: skip
        assert control_length(lengths, difference)["extrapolated"] is extrapolated


def test_matched_lengths_by_hand():
    """Against 100 tokens: 90, 100 and 111 are within a tenth of the longer, 89 and 112 are not; 0 and 0 are equal."""
    rewards, own = [1.0, 2.0, 3.0, 50.0, 50.0, 6.0], [90, 100, 111, 89, 112, 0]

    def match(prompts: int, **options: float) -> dict:
        return match_lengths(*(np.tile(row, (prompts, 1)) for row in (rewards, own, [100] * 5 + [0])), **options)

    assert match(10) == {
        "tolerance": 0.1, "pairs": 40, "prompts": 10, "of": 60, "difference": {"mean": 3.0, "se": 0.0},
    }  # fmt: skip
    assert match(10, tolerance=0.11)["pairs"] == 60
    assert (match(9)["difference"], match(9)["pairs"]) == (None, 36)
    assert match(9)["reason"] == "pairs of similar length belong to 9 prompts; at least 10 are needed"


def test_matched_lengths_error_is_clustered():
    """Ten prompts, rewards 0 … 9 three times each: mean 4.5, se = sd of 0 … 9 over √10; a third does not match."""
    rewards = np.repeat(np.arange(10.0)[:, None], 3, axis=1)
    result = match_lengths(rewards, np.tile([10, 10, 20], (10, 1)), np.full((10, 3), 10))
    assert result["difference"] == pytest.approx({"mean": 4.5, "se": np.arange(10).std(ddof=1) / math.sqrt(10)})
    assert result["pairs"] == 20
