"""What eval.py makes of answers: means over subsets, errors over seeds and by prompt; by hand."""

import numpy as np
import pytest

from var.evaluate.measures import average, averages, estimate, measure

LABELS = np.array(["a", "a", "b"])
REWARD = np.array([[1.0, 3.0], [2.0, 4.0], [0.0, 1.0]])  # [P, S]
TEXTS = [[("one two", True), ("one", False)]] * 3


def test_an_estimate_has_its_error_over_seeds_and_by_prompt():
    """Seeds' means 1 and 8/3; prompts' means 2, 3, 0.5, of standard deviation √(19/12)."""
    found = estimate(REWARD)
    assert found["mean"] == pytest.approx(11 / 6)
    assert found["se_seeds"] == pytest.approx((8 / 3 - 1) / 2)
    assert found["se_prompts"] == pytest.approx(np.sqrt(19 / 12 / 3))
    assert found["by_seed"] == pytest.approx([1, 8 / 3])


def test_one_seed_has_no_error_over_seeds():
    assert estimate(REWARD[:, :1])["se_seeds"] is None


def test_subsets_count_once_each_in_an_average():
    """Subset a: 1.5 and 3.5 by seed, b: 0 and 1; the average 0.75 and 2.25."""
    found = average([estimate(REWARD[:2]), estimate(REWARD[2:])])
    assert found["by_seed"] == pytest.approx([0.75, 2.25])
    assert found["mean"] == pytest.approx(1.5)
    assert found["se_seeds"] == pytest.approx(0.75)
    assert found["se_prompts"] is None  # b is one prompt


def test_the_averages_name_the_subsets_that_are_there():
    measured = measure(LABELS, TEXTS, np.array([[2, 1]] * 3), {"reward": REWARD})
    found = averages(measured, {"some": ["b", "missing"], "none": ["missing"], "all": ["a", "b"]})
    assert (found["some"]["of"], found["some"]["without"]) == (["b"], ["missing"])
    assert found["some"]["reward"]["mean"] == 0.5
    assert set(found) == {"some", "all"}
    assert found["all"]["of"] == ["a", "b"]
    assert measured["a"]["prompts"] == 2
    assert measured["a"]["cut"] == 0.5
    assert measured["b"]["reward_sigmoid"]["by_seed"] == pytest.approx([50, 100 / (1 + np.exp(-1))])
