"""A-LoL and its forms, by hand, and the minimizers of reward-weighted losses over a table of responses."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import VALUE_FIT, check_loss, double, make_batch, minimize
from var.losses.alol import ALoL
from var.losses.wbc import WBC
from var.models.packing import Packed

LOGPS = [-1.0, -2.0, -3.0, -0.5, -1.0, -1.5, -4.0]
RATIOS = [2, 0.25, 3, 0.5, 0.04, 1.5, 0.7]  # of tokens. Of sequences: 1/2, 3, 3/100, 7/10
CLIPPED = [0.5, 1.9, 0.1, 0.7]
REFERENCE_FREE = ALoL(value=VALUE_FIT, ratio="none", clip=None)
KL_SUM = 6.75 + 0.75 * math.log(0.5 * 3 * 0.03 * 0.7)


def make_responses(**fields: Any) -> Packed:
    """Return four responses, of which the last has a negative advantage. The NLL is 3, 3, 3, 4."""
    reference = double(LOGPS) - double(RATIOS).log()
    defaults = {"reference_logps": reference, "advantages": double([1.5, 0.25, 0.5, -2.0])}
    return make_batch([2, 1, 3, 1], **{**defaults, **fields})


@pytest.mark.parametrize(
    ("options", "total", "weights", "ratios", "clipped"),
    [
        # A⁺ρ = 0.75, 0.475, 0.05, 0, each times an NLL of 3. The gradient is −A⁺ρ also where ρ is clipped.
        ({}, 3.825, [0.75, 0.75, 0.475, 0.05, 0.05, 0.05, 0.0], CLIPPED, 1 / 2),
        # A⁺ρ = 0.75, 0.75, 0.015, 0.
        ({"clip": None}, 4.545, [0.75, 0.75, 0.75, 0.015, 0.015, 0.015, 0.0], [0.5, 3, 0.03, 0.7], 0.0),
        # The unclamped A adds −2 · 0.7 · 4, and makes the last response less likely.
        ({"clamp": False, "draw": "all"}, -1.775, [0.75, 0.75, 0.475, 0.05, 0.05, 0.05, -1.4], CLIPPED, 1 / 2),
        # ρ_t times A⁺: 2.85 · 1 + 0.375 · 2 + 0.475 · 3 + 0.25 · 0.5 + 0.05 · 1 + 0.75 · 1.5.
        (
            {"ratio": "token"}, 6.325, [2.85, 0.375, 0.475, 0.25, 0.05, 0.75, 0.0],
            [1.9, 0.25, 1.9, 0.5, 0.1, 1.5, 0.7], 3 / 7,
        ),
        # ρ = 1: (1.5 + 0.25 + 0.5) · 3. There is no ratio, so none is reported.
        ({"ratio": "none", "clip": None}, 6.75, [1.5, 1.5, 0.25, 0.5, 0.5, 0.5, 0.0], None, None),
        # β = 3/4 adds β Σ log ρ, and the coefficient is A⁺ − β: three of four responses are made less likely, two of
        # them with a positive advantage.
        (
            {"ratio": "none", "clip": None, "beta": 0.75}, KL_SUM,
            [0.75, 0.75, -0.5, -0.25, -0.25, -0.25, -0.75], None, None,
        ),
        # Unclamped, −2 · 4 is added and the last coefficient is −2 − β.
        (
            {"ratio": "none", "clip": None, "beta": 0.75, "clamp": False, "draw": "all"}, KL_SUM - 8,
            [0.75, 0.75, -0.5, -0.25, -0.25, -0.25, -2.75], None, None,
        ),
    ],
    ids=["sequence", "unclipped", "unclamped", "token", "reference_free", "kl", "kl_unclamped"],
)  # fmt: skip
def test_forms_match_hand_computation(options, total, weights, ratios, clipped):
    """ε = 0.9: the ratios of sequences are 0.5, 3 → 1.9, 0.03 → 0.1, 0.7. The step has 5 sequences."""
    gradient = [-weight / 5 for weight in weights]
    metrics = check_loss(
        ALoL(value=VALUE_FIT, **options), make_responses(global_sequences=5.0), total / 5, gradient, LOGPS
    )
    expected = {"nll": 13 / 7, "logps/sequence": -13 / 4, "advantage/positive": 0.75}
    if ratios:
        expected |= {"ratio/mean": sum(ratios) / len(ratios), "ratio/clipped": clipped}
    assert metrics == pytest.approx(expected)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_ratio_at_the_reference_is_1_bit_for_bit(ratio):
    """π_θ = π_ref, both in float32: the forms with a ratio equal the reference-free form."""
    torch.manual_seed(0)
    logps = -torch.rand(7)
    batch = make_responses(reference_logps=logps)
    reference_free, _ = REFERENCE_FREE(logps, batch)
    loss, metrics = ALoL(value=VALUE_FIT, ratio=ratio)(logps, batch)
    assert loss == reference_free
    assert loss.dtype == torch.float32
    assert metrics["ratio/mean"].total == metrics["ratio/mean"].number


def test_value_fit_is_a_setting_of_the_loss():
    assert asdict(ALoL(value=VALUE_FIT))["value"] == asdict(VALUE_FIT)


# Minimizers over a table of responses


@pytest.mark.parametrize(
    ("loss", "repeats", "fields", "expected", "atol"),
    [
        pytest.param(
            # R-LoL with ρ = 1 (A.1 of the VAR paper): π ∝ π_ref R, with R = 0.5, 1, 2, 0.25.
            WBC(), [1, 2, 3, 4], {"rewards": [0.5, 1, 2, 0.25]}, [0.5, 2, 6, 1], 1e-8,
            id="wbc_is_reference_times_reward",
        ),
        pytest.param(
            WBC(), [1, 1], {"rewards": [1.0, 0.9]}, [1.0, 0.9], 1e-7,
            id="wbc_separates_close_rewards_in_proportion",
        ),
        pytest.param(
            # π ∝ π_ref A⁺. Nothing is left for the response below V.
            REFERENCE_FREE, [1, 2, 3, 4], {"advantages": [1.5, -0.5, 0.75, 0.25]}, [1.5, 0, 2.25, 1], 1e-6,
            id="reference_free_is_reference_times_positive_advantage",
        ),
        pytest.param(
            # Draws ∝ A⁺ of a uniform π_ref with A = 1, 2, 3: rows occur 1, 2, 3 times and the loss contains A.
            REFERENCE_FREE, [1, 2, 3], {"advantages": [1.0, 2.0, 3.0]}, [1, 4, 9], 1e-8,
            id="priority_draw_weights_by_the_squared_advantage",
        ),
    ],
)  # fmt: skip
def test_minimizer_over_a_table(loss, repeats, fields, expected, atol):
    """π_ref is given by `repeats`: how often each response occurs. Responses have 1, 2, 1 and 3 tokens."""
    rows = [k for k, count in enumerate(repeats) for _ in range(count)]
    lengths = torch.tensor([1, 2, 1, 3][: len(repeats)])
    columns = {name: double(values)[rows] for name, values in fields.items()}
    batch = make_batch(lengths[rows].tolist(), **columns)
    response = torch.tensor(rows)[batch.sequence]
    # Each token has an equal part of log π(y).
    found = minimize(lambda logps: loss((logps / lengths)[response], batch)[0], len(repeats))
    assert_close(found, double(expected) / sum(expected), rtol=0, atol=atol)
