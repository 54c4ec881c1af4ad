"""KTO: values and gradients by hand; the reference point, its clamp, and no gradient through it."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import HALVES, LENGTHS, LOGPS, REFERENCE, kinds, loss_and_gradient
from var.losses.kto import KTO
from var.requirements import Desirable, MismatchedLogps, ReferenceLogps, Rewards
from var.utils.errors import UserError

DESIRABLE = [True, True, False, False]
MISMATCHED = [-3.0, -4.0, -5.0, -6.0], [-3.5, -5.0, -4.0, -7.0]  # policy, reference; differences 0.5, 1, −1, 1
LOSS = KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)


def batch_with(batch_of, sequences=slice(None), tokens=slice(None), mismatched=MISMATCHED, **extra):
    return batch_of(
        LENGTHS[sequences],
        reference_logps=torch.tensor(REFERENCE[tokens]),
        desirable=torch.tensor(DESIRABLE[sequences]),
        mismatched_logps=torch.tensor(mismatched[0][sequences], dtype=torch.float64),
        mismatched_reference_logps=torch.tensor(mismatched[1][sequences], dtype=torch.float64),
        **extra,
    )


def test_loss_and_gradient_by_hand(batch_of):
    """z0 = (0.5 + 1 − 1 + 1)/4 = 0.375. β = 1/2, gains: β(ρ − z0) = 0.8125, 0.0625 where desirable, β(z0 − ρ) =
    1.1875, −0.8125 where not. σ(−gain): 0.3073580, 0.4843801, 0.2337064, 0.6926420, weighed by 1.5, 1.5, 0.5, 0.5.

    Gradient of a token: ∓β · weight · σ'(gain)/4 sequences: σ' = 0.2128891, 0.2497560, 0.1790877, 0.2128891.
    """
    value, gradient, metrics = loss_and_gradient(LOSS, batch_with(batch_of))
    expected = 1.5 * (0.3073580169 + 0.4843800843) + 0.5 * (0.2337063569 + 0.6926419831)
    assert value == pytest.approx(expected / 4, rel=1e-9)
    a, b = -1.5 / 8 * 0.2128890663, -1.5 / 8 * 0.2497560182
    c, d = 0.5 / 8 * 0.1790876957, 0.5 / 8 * 0.2128890663
    assert_close(gradient, torch.tensor([a, a, b, c, d, d], dtype=torch.float64), rtol=1e-8, atol=0)
    assert metrics == pytest.approx(
        {
            "nll": 12.5 / 6, "kl": 0.375,
            "implicit_reward/desirable": (1 + 0.25) / 2, "implicit_reward/undesirable": 0.0,
        }
    )  # fmt: skip


def test_a_negative_estimate_of_the_kl_counts_as_zero(batch_of):
    """Differences −1, −1, −1, 2.5: their mean −0.125 is no KL. z0 = 0: gains 1, 0.25 | 1, −1."""
    mismatched = [-2.0, -2.0, -2.0, -2.0], [-1.0, -1.0, -1.0, -4.5]
    loss, metrics = LOSS(torch.tensor(LOGPS).double(), batch_with(batch_of, mismatched=mismatched))
    sigma = [1 / (1 + math.exp(gain)) for gain in (1.0, 0.25, 1.0, -1.0)]
    assert loss.item() == pytest.approx((1.5 * sum(sigma[:2]) + 0.5 * sum(sigma[2:])) / 4, rel=1e-12)
    assert metrics["kl"].total.item() == 0.0


def test_the_reference_point_holds_no_gradient(batch_of):
    policy = torch.tensor(MISMATCHED[0], dtype=torch.float64, requires_grad=True)
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    batch = batch_of(
        LENGTHS, reference_logps=torch.tensor(REFERENCE), desirable=torch.tensor(DESIRABLE), mismatched_logps=policy,
        mismatched_reference_logps=torch.tensor(MISMATCHED[1], dtype=torch.float64),
    )  # fmt: skip
    LOSS(logps, batch)[0].backward()
    assert policy.grad is None


def test_sequences_of_a_step_add_up_over_micro_batches_of_one_reference_point(batch_of):
    """z0 is the micro-batch's own: where it is the same (differences 0.5, 1 | 1, 0.5), two micro-batches of two
    sequences sum to the whole; the divisor is the step's sequences."""
    mismatched = [-3.0, -4.0, -6.0, -2.0], [-3.5, -5.0, -7.0, -2.5]
    whole, _ = LOSS(torch.tensor(LOGPS).double(), batch_with(batch_of, mismatched=mismatched))
    total = 0.0
    for sequences, tokens in HALVES:
        batch = batch_with(batch_of, sequences, tokens, mismatched, global_sequences=4.0)
        total += LOSS(torch.tensor(LOGPS[tokens]).double(), batch)[0].item()
    assert total == pytest.approx(whole.item(), rel=1e-15)


def test_a_micro_batch_of_one_kind_counts_none_of_the_other(batch_of):
    """So that the means over a step are exact: 0 out of 0."""
    batch = batch_with(batch_of, slice(0, 2), slice(0, 3))
    _, metrics = LOSS(torch.tensor(LOGPS[:3]).double(), batch)
    assert metrics["implicit_reward/undesirable"] == (0.0, 0.0)
    assert metrics["implicit_reward/desirable"] == (1.25, 2.0)


def test_step_0_is_half_the_weight(batch_of):
    """Policy = reference: every gain is 0, so the loss is the mean weight over 2: (1.5 + 1.5 + 0.5 + 0.5)/8."""
    batch = batch_with(batch_of, mismatched=(MISMATCHED[1], MISMATCHED[1]))
    assert LOSS(torch.tensor(REFERENCE), batch)[0].item() == 0.5


def test_needs_rewards_only_with_a_threshold():
    needs = {Desirable, ReferenceLogps, MismatchedLogps}
    assert kinds(KTO()) == needs
    assert kinds(KTO(threshold=0.0)) == needs | {Rewards}


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": math.nan}, {"desirable_weight": 0.0}, {"undesirable_weight": math.nan}]
)
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        KTO(**options)
    assert str(error.value) == "loss.beta, loss.desirable_weight and loss.undesirable_weight are > 0"
