"""The studies on few rows: new prompts judge, and losses along training."""

import math

import pytest

from experiments.tabular import few
from experiments.tabular.methods import METHODS
from experiments.tabular.worlds import draw_world

BY_NAME = {method.name: method for method in METHODS}


def test_exact_weights_help_on_new_prompts_and_sft_does_not():
    """Two worlds of 64 prompts. Online objectives are limited by the number of rewards, unless marked."""
    names = ["sft", "weighted, exact Z", "rejection sampling", "var", "rloo"]
    chosen = [BY_NAME[name] for name in names]
    found = few.make_table(
        methods=chosen,
        seeds=(0, 1),
        make_world=lambda seed: draw_world(seed, prompts=64, letters=2, tokens=2, overlap=0.4),
    )
    by_name = {r["method"]: r for r in found}
    assert next(iter(by_name)) == "π_ref"
    assert by_name["π_ref"]["gain"] == 0
    assert by_name["weighted, exact Z"]["gain"] > 0.05 + by_name["sft"]["gain"]
    assert by_name["sft"]["evaluations"] == 0
    assert by_name["var"]["evaluations"] == 8 * by_name["rejection sampling"]["evaluations"] == 8 * 4 * 32
    assert by_name["rloo"]["evaluations"] <= 128 < by_name["rloo, more rollouts"]["evaluations"]


def rows_of(curves, name):
    return [r for r in curves if r["method"] == name]


def test_vars_loss_stays_between_its_bound_and_its_first_value(curves):
    rows = rows_of(curves, "var_grouped")
    losses = [r["loss"] for r in rows]
    assert min(losses) >= rows[0]["bound"] > 0
    assert max(losses) == losses[0]
    assert rows[-1]["chosen"] > rows[0]["chosen"]


def test_negative_coefficients_make_a_loss_fall_without_bound(curves):
    losses = [r["loss"] for r in rows_of(curves, "alol_ref_free, A unclamped")]
    assert losses[-1] < losses[len(losses) // 2] < -1
    assert losses[len(losses) // 2] - losses[-1] > 1


def test_better_responses_lose_probability_under_dpo(curves):
    rows = rows_of(curves, "dpo")
    assert rows[-1]["chosen"] < rows[0]["chosen"] - 0.5
    assert rows[-1]["loss"] < rows[0]["loss"] == pytest.approx(math.log(2))
