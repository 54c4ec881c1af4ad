"""RLOO: the KL penalty in the reward, the leave-one-out baseline, and one clipped ratio per sequence, by hand."""

import math
from typing import Any

import pytest
from torch.testing import assert_close

from tests.helpers.losses import check_loss, compute_loss, double, make_batch
from var.losses.rloo import RLOO
from var.models.packing import Packed

# Two groups: of three responses (2 tokens, 1, 1) and of two (2, 1).
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -0.5]
RATIOS = [1.25, 1.6, 0.5, 0.5, 1.5, 2.0, 1.1]  # of tokens. Of sequences: 2, 0.5, 0.5, 3, 1.1
OLD_OVER_REFERENCE = [1.0, 1.0, 0.0, -2.0, 0.5, -0.5, 2.0]  # log-ratios. Of sequences: 2, 0, −2, 0, 2


def make_rollout(**fields: Any) -> Packed:
    """Return the two groups."""
    old = double(LOGPS) - double(RATIOS).log()
    defaults = {"old_logps": old, "reference_logps": old - double(OLD_OVER_REFERENCE)}
    rewards = [4.0, 1.0, 2.0, 0.0, 4.0]
    return make_batch([2, 1, 1, 2, 1], group=[0, 0, 0, 1, 1], rewards=rewards, **{**defaults, **fields})


def test_loss_matches_hand_computation():
    """β = 1/2: the rewards minus the penalty are 3, 1, 3 | 0, 3. Minus the mean of the others: 1, −2, 1 | −3, 3.

    A > 0: ρ = 2 is clipped at 1.2, 0.5 is not. A < 0: 0.5 is clipped at 0.8, 3 is not. −1.2 + 1.6 − 0.5 + 9 − 3.3 =
    5.6 over 5 sequences. Each token of a sequence has gradient −ρA/5, or 0 if it is clipped.
    """
    gradient = [slope / 5 for slope in (0, 0, 0, -0.5, 9, 9, -3.3)]
    metrics = check_loss(RLOO(beta=0.5), make_rollout(), 1.12, gradient, LOGPS)
    log_ratios = [math.log(r) + d for r, d in zip(RATIOS, OLD_OVER_REFERENCE, strict=True)]  # log π_θ − log π_ref
    assert metrics == pytest.approx(
        {
            "nll": 13 / 7, "reward/mean": 2.2, "kl": sum(math.exp(-d) + d - 1 for d in log_ratios) / 7,
            "groups/zero_variance": 0.0, "ratio/mean": 7.1 / 5, "ratio/clipped": 0.4,
        }
    )  # fmt: skip


def test_loss_without_kl_reads_no_reference():
    """Rewards 4, 1, 2 | 0, 4 have advantages 2.5, −2, −0.5 | −4, 4: −1.2·2.5 + 1.6 + 0.8·0.5 + 12 − 4.4 = 6.6."""
    value, _, metrics = compute_loss(RLOO(beta=0.0), make_rollout(reference_logps=None), LOGPS)
    assert value == pytest.approx(6.6 / 5, rel=1e-12)
    assert "kl" not in metrics


def test_gradient_on_own_samples_is_reinforce():
    """ρ = 1 everywhere, so each token of a sequence has gradient −A/5, with the advantages above."""
    _, gradient, metrics = compute_loss(RLOO(beta=0.0), make_rollout(old_logps=double(LOGPS)), LOGPS)
    assert_close(gradient, -double([2.5, 2.5, -2, -0.5, -4, -4, 4]) / 5, rtol=1e-12, atol=0)
    assert metrics["ratio/clipped"] == 0
