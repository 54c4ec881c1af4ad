"""Clustered standard errors by hand, and how estimates print and are stored."""

import json
import math

import numpy as np
import pytest

from var.utils.statistics import Estimate, estimate_by_prompt, estimate_mean, fit_ols


def test_rows_are_the_independent_draws():
    """Row means 2, 2, 5: mean 3, standard deviation √3 over √3 rows is 1. The spread within a row does not count."""
    estimate = estimate_mean(np.array([[1.0, 3.0], [2.0, 2.0], [6.0, 4.0]]))
    assert estimate == (pytest.approx(3.0), pytest.approx(1.0))
    assert estimate_mean(np.array([[0.0, 4.0], [2.0, 2.0], [5.0, 5.0]])) == pytest.approx(estimate)
    assert estimate_mean(np.array([2.0, 2.0, 5.0])) == pytest.approx(estimate)


@pytest.mark.parametrize(
    ("value", "text", "record"),
    [
        (Estimate(3.0, 1.0), "3.000 ± 1.000", {"mean": 3.0, "se": 1.0}),
        (Estimate(2.0), "2.000", {"mean": 2.0, "se": None}),
        (Estimate(math.nan), "–", {"mean": None, "se": None}),
    ],
)
def test_estimates_print_and_are_stored(value, text, record):
    assert str(value) == f"{value}" == text
    assert value.to_json() == record
    assert str(Estimate.from_json(json.loads(json.dumps(record, allow_nan=False)))) == text


def test_format_spec_sets_digits_and_scale_the_unit():
    assert f"{Estimate(0.12345, 0.045).scale(100):.1f}" == "12.3 ± 4.5"
    assert f"{Estimate.from_json({'mean': 1.0, 'se_prompts': 0.25}):.2f}" == "1.00 ± 0.25"
    assert f"{Estimate.from_json(0.5)} {Estimate.from_json(None)}" == "0.500 –"


def test_single_prompt_or_no_values_have_no_standard_error():
    assert estimate_mean(np.array([[1.0, 3.0]])) == estimate_by_prompt(np.array([[1.0, 3.0]])) == (2.0, None)
    assert math.isnan(estimate_by_prompt(np.full((2, 2), np.nan)).mean)


def test_clusters_may_have_any_sizes():
    """1, 0 | 1: mean 2/3; sums −1/3 and 1/3: √(2 · 2/9)/3 = 2/9."""
    assert estimate_mean(np.array([1.0, 0.0, 1.0]), ["a", "a", "b"]) == pytest.approx((2 / 3, 2 / 9))
    values = np.array([3.0, 1.0, 4.0, 1.0])
    assert estimate_mean(values, list("abcd")).se == pytest.approx(values.std(ddof=1) / 2)
    assert estimate_mean(values, list("aaaa")).se is None


def test_both_formulas_agree_for_complete_values():
    values = np.random.default_rng(1).normal(size=(7, 4))
    assert estimate_by_prompt(values) == pytest.approx(estimate_mean(values))


@pytest.mark.parametrize(("clusters", "variance"), [([0, 0, 1, 1], 9.0), ([5, 2, 2, 2], 4.0)])
def test_variance_of_a_mean_by_hand(clusters, variance):
    """y = 0, 2, 4, 10 in clusters {0, 2} and {4, 10}, mean 4: sums of residuals −6 and 6.

    Covariance: 2/1 · 3/3 · (36 + 36)/16 = 9. Unequal clusters {0}, {2, 4, 10}: −4 and 4, 2 · (16 + 16)/16 = 4.
    """
    coefficients, covariance = fit_ols(np.array([0.0, 2.0, 4.0, 10.0]), np.ones((4, 1)), np.array(clusters))
    assert (coefficients[0], covariance[0, 0]) == pytest.approx((4.0, variance))


def test_covariance_with_a_slope_is_the_written_out_formula():
    """Each cluster's sum and G/(G−1)·(n−1)/(n−k), as in statsmodels with cov_type="cluster"."""
    draw = np.random.default_rng(3)
    x, y, clusters = draw.normal(30, 40, 10).round(), draw.normal(size=10), np.repeat(np.arange(5), 2)
    X = np.stack([np.ones(10), x], axis=1)
    coefficients, covariance = fit_ols(y, X, clusters)
    slope = np.cov(x, y)[0, 1] / np.var(x, ddof=1)
    assert coefficients == pytest.approx([y.mean() - slope * x.mean(), slope])
    meat = np.zeros((2, 2))
    for g in range(5):
        s = sum((y[i] - coefficients @ X[i]) * X[i] for i in (2 * g, 2 * g + 1))
        meat += np.outer(s, s)
    bread = np.linalg.inv(X.T @ X)
    assert covariance == pytest.approx(5 / 4 * 9 / 8 * bread @ meat @ bread)
