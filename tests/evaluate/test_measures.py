"""Means over subsets with errors over seeds and by prompt, by hand."""

import numpy as np
import pytest

from var.evaluate.measures import average, average_subsets, estimate, measure

LABELS = np.array(["a", "a", "b"])
REWARD = np.array([[1.0, 3.0], [2.0, 4.0], [0.0, 1.0]])  # [P, S]


def test_estimate_has_errors_over_seeds_and_by_prompt():
    """Seeds' means 1 and 8/3; prompts' means 2, 3, 0.5, of standard deviation √(19/12)."""
    result = estimate(REWARD)
    assert result["mean"] == pytest.approx(11 / 6)
    assert result["se_seeds"] == pytest.approx((8 / 3 - 1) / 2)
    assert result["se_prompts"] == pytest.approx(np.sqrt(19 / 12 / 3))
    assert result["by_seed"] == pytest.approx([1, 8 / 3])
    assert estimate(REWARD[:, :1])["se_seeds"] is None


def test_subsets_count_once_each_in_an_average():
    """Subset a: 1.5 and 3.5 by seed, b: 0 and 1; the average 0.75 and 2.25."""
    result = average([estimate(REWARD[:2]), estimate(REWARD[2:])])
    assert result["by_seed"] == pytest.approx([0.75, 2.25])
    assert result["mean"] == pytest.approx(1.5)
    assert result["se_seeds"] == pytest.approx(0.75)
    assert result["se_prompts"] is None  # b is one prompt


def test_averages_name_the_subsets_that_exist():
    subsets = measure(LABELS, [["one two", "one"]] * 3, np.array([[True, False]] * 3), np.array([[2, 1]] * 3),
                      {"reward": REWARD})  # fmt: skip
    result = average_subsets(subsets, {"some": ["b", "missing"], "none": ["missing"], "all": ["a", "b"]})
    assert (result["some"]["of"], result["some"]["without"]) == (["b"], ["missing"])
    assert result["some"]["reward"]["mean"] == 0.5
    assert set(result) == {"some", "all"}
    assert result["all"]["of"] == ["a", "b"]
    assert subsets["a"]["prompts"] == 2
    assert subsets["a"]["truncated"] == 0.5
    assert subsets["b"]["reward_sigmoid"]["by_seed"] == pytest.approx([50, 100 / (1 + np.exp(-1))])
