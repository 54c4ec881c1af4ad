"""Length control: worlds with a planted gain, the sandwich by hand, and how often its interval holds the truth."""

import math

import numpy as np
import pytest

from var.evaluate.lengths import distribution, estimate, length_controlled, matched
from var.utils.statistics import clustered, clustered_ols


def world(seed: int = 0, prompts: int = 40, replicates: int = 3) -> tuple[np.random.Generator, np.ndarray]:
    """Δlength [P, S] in tokens, of both signs, its mean far from 0."""
    draw = np.random.default_rng(seed)
    return draw, draw.normal(30, 40, (prompts, replicates)).round()


def test_a_distribution_by_hand():
    """Two prompts, [1, 3] and [5, 7]: means 2 and 6, so 4 ± |6 − 2|/2 = 2; sd of 1, 3, 5, 7 is √(20/3)."""
    told = distribution(np.array([[1, 3], [5, 7]]))
    assert told["mean"] == 4
    assert told["se"] == pytest.approx(2)
    assert told["sd"] == pytest.approx(math.sqrt(20 / 3))
    assert told["quantiles"] == pytest.approx({"5": 1.3, "25": 2.5, "50": 4.0, "75": 5.5, "95": 6.7})
    assert told["longest"] == 7


def test_a_single_prompt_or_none_has_no_standard_error():
    assert estimate(np.array([[1.0, 3.0]])) == {"mean": 2.0, "se": None}
    assert estimate(np.full((2, 2), np.nan)) == {"mean": None, "se": None}
    assert distribution(np.array([[4]])) == {
        "mean": 4.0, "se": None, "sd": None, "quantiles": dict.fromkeys(("5", "25", "50", "75", "95"), 4.0),
        "longest": 4,
    }  # fmt: skip


def test_the_mean_and_its_error_are_those_of_validation():
    values = np.random.default_rng(1).normal(size=(7, 4))
    assert list(estimate(values).values()) == pytest.approx(list(clustered(values)))


def test_clustered_errors_by_hand():
    """y = 0, 2, 4, 10 in clusters {0, 2} and {4, 10}, mean 4: sums of residuals −6 and 6.

    Covariance: 2/1 · 3/3 · (36 + 36)/16 = 9. Unequal clusters {0}, {2, 4, 10}: −4 and 4, 2 · (16 + 16)/16 = 4.
    """
    y, ones = np.array([0.0, 2.0, 4.0, 10.0]), np.ones((4, 1))
    for cluster, variance in (([0, 0, 1, 1], 9.0), ([5, 2, 2, 2], 4.0)):
        coefficients, covariance = clustered_ols(y, ones, np.array(cluster))
        assert (coefficients[0], covariance[0, 0]) == pytest.approx((4.0, variance))


def test_clustered_errors_with_a_slope_are_the_formula_written_out():
    """Each observation's own sum, G/(G−1)·(n−1)/(n−k), no vectorising: the cov_type="cluster" of statsmodels."""
    draw, x = world(3, prompts=5, replicates=2)
    y, x, cluster = draw.normal(size=10), x.reshape(-1), np.repeat(np.arange(5), 2)
    X = np.stack([np.ones(10), x], axis=1)
    coefficients, covariance = clustered_ols(y, X, cluster)
    slope = np.cov(x, y)[0, 1] / np.var(x, ddof=1)
    assert coefficients == pytest.approx([y.mean() - slope * x.mean(), slope])
    meat = np.zeros((2, 2))
    for g in range(5):
        s = sum((y[i] - coefficients @ X[i]) * X[i] for i in (2 * g, 2 * g + 1))
        meat += np.outer(s, s)
    bread = np.linalg.inv(X.T @ X)
    assert covariance == pytest.approx(5 / 4 * 9 / 8 * bread @ meat @ bread)


def test_a_line_gives_the_planted_gain_and_slope():
    """Δreward = 0.3 + 0.7·x exactly: gain 0.3, slope 0.7, no error; the plain difference is larger."""
    _, lengths = world()
    unit = lengths.std(ddof=1)
    told = length_controlled(0.3 + 0.7 * lengths / unit, lengths)
    assert told["unit"] == pytest.approx(unit)
    assert told["gain"] == pytest.approx({"mean": 0.3, "se": 0.0}, abs=1e-9)
    assert told["slope"] == pytest.approx({"mean": 0.7, "se": 0.0}, abs=1e-9)
    assert told["difference"]["mean"] > 0.5
    assert (told["pairs"], told["prompts"], told["left_out"]) == (120, 40, 0)
    assert not told["extrapolated"]


def test_a_reward_that_is_only_length_gains_nothing():
    _, lengths = world()
    told = length_controlled(0.01 * lengths, lengths)
    assert told["gain"]["mean"] == pytest.approx(0, abs=1e-12)
    assert told["difference"]["mean"] == pytest.approx(0.01 * lengths.mean())
    assert told["slope"]["mean"] == pytest.approx(0.01 * told["unit"])


def test_where_a_few_very_long_answers_flatten_the_line_pairs_of_like_length_do_not():
    """Rewards that saturate, 0.5·tanh(Δ/40), are no gain. Two answers that are longer by 4,000 tokens make the line
    flat, so that nearly all of the mean difference passes for a gain; pairs of like length are not touched by them."""
    _, lengths = world(5)
    longer = np.vstack([lengths, [[4000.0, 4000.0, 0.0]]])
    reward = 0.5 * np.tanh(longer / 40)
    told = length_controlled(reward, longer)
    assert told["gain"]["mean"] > 0.8 * told["difference"]["mean"] > 0.1
    near = matched(reward, 400 + longer, np.full(longer.shape, 400.0), tolerance=0.02)
    assert abs(near["difference"]["mean"]) < 0.05


def test_the_interval_holds_the_planted_gain_as_often_as_it_says():
    """400 worlds of 60 prompts × 3 whose prompts share half of the noise: 1.96 se cover 95 %, short of it by little.

    Errors that ignore the prompt would be √2 too short: √(1 + 2·0.5), and cover 83 %.
    """
    held = 0
    for seed in range(400):
        draw, lengths = world(seed, prompts=60)
        noise = draw.normal(size=(60, 1)) + draw.normal(size=(60, 3))
        gain = length_controlled(0.2 + 0.005 * lengths + noise, lengths)["gain"]
        held += abs(gain["mean"] - 0.2) <= 1.96 * gain["se"]
    assert 0.91 < held / 400 < 0.98


def test_pairs_without_a_number_are_left_out_and_counted():
    _, lengths = world()
    rewards = 0.3 + 0.0 * lengths
    rewards[0, 0] = rewards[3] = np.nan
    told = length_controlled(rewards, lengths)
    assert (told["pairs"], told["prompts"], told["left_out"]) == (116, 39, 4)
    assert told["gain"]["mean"] == pytest.approx(0.3)


def test_a_gain_that_is_not_identified_is_null_with_the_reason():
    _, lengths = world(prompts=9)
    told = length_controlled(lengths, lengths)
    assert (told["gain"], told["slope"], told["reason"]) == (None, None, "9 prompts; at least 10 are needed")
    told = length_controlled(np.ones((20, 2)), np.full((20, 2), 5.0))
    assert told["gain"] is None
    assert told["reason"] == "all pairs differ by 5 tokens, so nothing tells length from the rest"
    _, lengths = world()
    lengths[:30] = 0
    assert length_controlled(lengths, lengths)["gain"]["mean"] == pytest.approx(0)
    assert length_controlled(np.full((20, 2), np.nan), np.ones((20, 2)))["difference"] == {"mean": None, "se": None}


def test_a_line_followed_beyond_the_data_says_so():
    _, lengths = world()
    assert length_controlled(lengths, np.abs(lengths) + 1)["extrapolated"]
    assert length_controlled(lengths, -np.abs(lengths) - 1)["extrapolated"]
    assert not length_controlled(lengths, np.abs(lengths) - np.abs(lengths).min())["extrapolated"]


def test_pairs_of_like_length_by_hand():
    """Against 100 tokens: 90, 100 and 111 are within a tenth of the longer, 89 and 112 are not; 0 and 0 are equal."""
    mine, theirs = np.array([90, 100, 111, 89, 112, 0]), np.array([100, 100, 100, 100, 100, 0])
    rewards = np.array([1.0, 2.0, 3.0, 50.0, 50.0, 6.0])
    told = matched(*(np.tile(values, (10, 1)) for values in (rewards, mine, theirs)))
    assert told == {
        "tolerance": 0.1, "pairs": 40, "prompts": 10, "of": 60, "difference": {"mean": 3.0, "se": 0.0},
    }  # fmt: skip
    wider = matched(*(np.tile(values, (10, 1)) for values in (rewards, mine, theirs)), tolerance=0.11)
    assert wider["pairs"] == 60
    few = matched(*(np.tile(values, (9, 1)) for values in (rewards, mine, theirs)))
    assert (few["difference"], few["pairs"]) == (None, 36)
    assert few["reason"] == "pairs of like length are of 9 prompts; at least 10 are needed"


def test_the_error_among_pairs_of_like_length_is_clustered():
    """Ten prompts, rewards 0 … 9 each thrice: mean 4.5, se = sd of 0 … 9 over √10 = 0.957; a third of the pairs do
    not match."""
    rewards = np.repeat(np.arange(10.0)[:, None], 3, axis=1)
    told = matched(rewards, np.tile([10, 10, 20], (10, 1)), np.full((10, 3), 10))
    assert told["difference"] == pytest.approx({"mean": 4.5, "se": np.arange(10).std(ddof=1) / math.sqrt(10)})
    assert told["pairs"] == 20
