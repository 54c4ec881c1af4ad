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

LENGTHS = [2, 1, 3, 1]
LOGPS = [-1.0, -2.0, -3.0, -0.5, -1.0, -1.5, -4.0]
RATIOS = [2, 0.25, 3, 0.5, 0.04, 1.5, 0.7]  # of tokens. Of sequences: 1/2, 3, 3/100, 7/10
ADVANTAGES = [1.5, 0.25, 0.5, -2.0]


def make_responses(**fields: Any) -> Packed:
    """Return four responses."""
    reference = double(LOGPS) - double(RATIOS).log()
    return make_batch(LENGTHS, **{"reference_logps": reference, "advantages": double(ADVANTAGES), **fields})


def test_sequence_ratio_matches_hand_computation():
    """ε = 0.9: ρ = 0.5, 3 → 1.9, 0.03 → 0.1, 0.7. A⁺ρ = 0.75, 0.475, 0.05, 0. The NLL of each response but the last
    is 3: (0.75 + 0.475 + 0.05) · 3 over the step's 5 sequences. The gradient is −A⁺ρ/5 also where ρ is clipped."""
    gradient = [-weight / 5 for weight in (0.75, 0.75, 0.475, 0.05, 0.05, 0.05, 0.0)]
    loss, batch = ALoL(value=VALUE_FIT, clip=0.9), make_responses(global_sequences=5.0)
    metrics = check_loss(loss, batch, 3.825 / 5, gradient, LOGPS)
    assert metrics == pytest.approx(
        {
            "nll": 13 / 7, "logps/sequence": -13 / 4, "advantage/positive": 0.75,
            "ratio/mean": (0.5 + 1.9 + 0.1 + 0.7) / 4, "ratio/clipped": 0.5,
        }
    )  # fmt: skip


def test_ratio_without_a_clip():
    """A⁺ρ = 0.75, 0.75, 0.015: times 3, over 4."""
    gradient = [-weight / 4 for weight in (0.75, 0.75, 0.75, 0.015, 0.015, 0.015, 0.0)]
    loss = ALoL(value=VALUE_FIT, clip=None)
    metrics = check_loss(loss, make_responses(), 1.515 * 3 / 4, gradient, LOGPS)
    assert metrics["ratio/mean"] == pytest.approx((0.5 + 3 + 0.03 + 0.7) / 4)
    assert metrics["ratio/clipped"] == 0


def test_negative_advantage_lowers_a_response_unless_clamped():
    """The unclamped A adds −2 · 0.7 · 4 to the sum 3.825, and its token's gradient is +1.4/4."""
    gradient = [slope / 4 for slope in (-0.75, -0.75, -0.475, -0.05, -0.05, -0.05, 1.4)]
    loss = ALoL(value=VALUE_FIT, clip=0.9, clamp=False, draw="all")
    check_loss(loss, make_responses(), (3.825 - 5.6) / 4, gradient, LOGPS)


def test_token_ratio_matches_hand_computation():
    """ρ_t: 2 → 1.9, 0.25 | 3 → 1.9 | 0.5, 0.04 → 0.1, 1.5 | 0.7, times A⁺ = 1.5, 0.25, 0.5, 0.

    2.85 · 1 + 0.375 · 2 + 0.475 · 3 + 0.25 · 0.5 + 0.05 · 1 + 0.75 · 1.5 = 6.325.
    """
    gradient = [-weight / 4 for weight in (2.85, 0.375, 0.475, 0.25, 0.05, 0.75, 0.0)]
    loss = ALoL(value=VALUE_FIT, ratio="token", clip=0.9)
    metrics = check_loss(loss, make_responses(), 6.325 / 4, gradient, LOGPS)
    assert metrics["ratio/mean"] == pytest.approx((1.9 + 0.25 + 1.9 + 0.5 + 0.1 + 1.5 + 0.7) / 7)
    assert metrics["ratio/clipped"] == pytest.approx(3 / 7)


def test_reference_free_form_matches_hand_computation():
    """ρ = 1: (1.5 + 0.25 + 0.5) · 3 over 4. There is no ratio, so none is reported."""
    gradient = [-weight / 4 for weight in (1.5, 1.5, 0.25, 0.5, 0.5, 0.5, 0.0)]
    loss = ALoL(value=VALUE_FIT, ratio="none", clip=None)
    metrics = check_loss(loss, make_responses(), 6.75 / 4, gradient, LOGPS)
    assert set(metrics) == {"nll", "logps/sequence", "advantage/positive"}


@pytest.mark.parametrize("clamp", [True, False])
def test_kl_form_has_the_coefficient_advantage_minus_beta(clamp):
    """β = 3/4: the sum is 6.75 + β Σ log ρ, with Σ log ρ = log(0.5 · 3 · 0.03 · 0.7). A token has gradient −(A⁺ − β)/4.

    A⁺ − β = 0.75, −0.5, −0.25, −0.75: three of four responses are made less likely, two of them with a positive
    advantage. Unclamped, the last coefficient is −2.75, and −2 · 4 is added to the sum.
    """
    loss = ALoL(value=VALUE_FIT, ratio="none", clip=None, beta=0.75, clamp=clamp, draw="all")
    total = 6.75 + 0.75 * math.log(0.5 * 3 * 0.03 * 0.7) - (0 if clamp else 8)
    last = -0.75 if clamp else -2.75
    gradient = [-weight / 4 for weight in (0.75, 0.75, -0.5, -0.25, -0.25, -0.25, last)]
    check_loss(loss, make_responses(), total / 4, gradient, LOGPS)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_ratio_at_the_reference_is_1_bit_for_bit(ratio):
    """π_θ = π_ref, both in float32: the forms with a ratio equal the reference-free form."""
    torch.manual_seed(0)
    logps = -torch.rand(7)
    batch = make_responses(reference_logps=logps)
    reference_free, _ = ALoL(value=VALUE_FIT, ratio="none", clip=None)(logps, batch)
    loss, metrics = ALoL(value=VALUE_FIT, ratio=ratio, clip=0.9)(logps, batch)
    assert loss == reference_free
    assert loss.dtype == torch.float32
    assert metrics["ratio/mean"].total == metrics["ratio/mean"].number


def test_value_fit_is_a_setting_of_the_loss():
    assert asdict(ALoL(value=VALUE_FIT))["value"] == asdict(VALUE_FIT)


# Minimizers over a table of responses

REFERENCE_FREE = ALoL(value=VALUE_FIT, ratio="none", clip=None)


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
