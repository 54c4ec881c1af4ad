"""KTO: by hand, and its reference point."""

import math
from typing import Any

import pytest

from tests.helpers.losses import LENGTHS, LOGPS, REFERENCE, check_loss, double, make_batch
from var.losses.kto import KTO
from var.models.packing import Packed

MISMATCHED = [-3.0, -4.0, -5.0, -6.0]  # of the policy
MISMATCHED_REFERENCE = [-3.5, -5.0, -4.0, -7.0]  # differences 0.5, 1, −1, 1
LOSS = KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)


def make_labeled_batch(**fields: Any) -> Packed:
    """Return two desirable and two undesirable responses."""
    return make_batch(
        LENGTHS,
        **{
            "desirable": [True, True, False, False], "reference_logps": REFERENCE, "mismatched_logps": MISMATCHED,
            "mismatched_reference_logps": MISMATCHED_REFERENCE, **fields,
        },
    )  # fmt: skip


def test_loss_matches_hand_computation():
    """z0 = (0.5 + 1 − 1 + 1)/4 = 0.375. β = 1/2: the gains are β(ρ − z0) = 0.8125, 0.0625 for desirable responses and
    β(z0 − ρ) = 1.1875, −0.8125 for the others. σ(−gain) = 0.3073580, 0.4843801, 0.2337064, 0.6926420 has the weights
    1.5, 1.5, 0.5, 0.5.

    A token has gradient ∓β · weight · σ'(gain)/4 sequences, with σ' = 0.2128891, 0.2497560, 0.1790877, 0.2128891.
    """
    value = (1.5 * (0.3073580169 + 0.4843800843) + 0.5 * (0.2337063569 + 0.6926419831)) / 4
    a, b = -1.5 / 8 * 0.2128890663, -1.5 / 8 * 0.2497560182
    c, d = 0.5 / 8 * 0.1790876957, 0.5 / 8 * 0.2128890663
    metrics = check_loss(LOSS, make_labeled_batch(), value, [a, a, b, c, d, d], rtol=1e-8)
    assert metrics == pytest.approx(
        {
            "nll": 12.5 / 6, "kl": 0.375,
            "implicit_reward/desirable": (1 + 0.25) / 2, "implicit_reward/undesirable": 0.0,
        }
    )  # fmt: skip


def test_negative_kl_estimate_counts_as_zero():
    """The differences −1, −1, −1, 2.5 have mean −0.125, which is not a KL. z0 = 0: gains 1, 0.25 | 1, −1."""
    batch = make_labeled_batch(
        mismatched_logps=[-2.0, -2.0, -2.0, -2.0], mismatched_reference_logps=[-1.0, -1.0, -1.0, -4.5]
    )
    loss, metrics = LOSS(double(LOGPS), batch)
    sigma = [1 / (1 + math.exp(gain)) for gain in (1.0, 0.25, 1.0, -1.0)]
    assert loss.item() == pytest.approx((1.5 * sum(sigma[:2]) + 0.5 * sum(sigma[2:])) / 4, rel=1e-12)
    assert metrics["kl"].total.item() == 0.0


def test_metrics_without_a_response_of_their_kind_count_nothing():
    """Then means over a step are exact. All responses are desirable here."""
    _, metrics = LOSS(double(LOGPS), make_labeled_batch(desirable=[True] * 4))
    assert metrics["implicit_reward/undesirable"] == (0.0, 0.0)
    assert metrics["implicit_reward/desirable"] == (1.25, 4.0)
