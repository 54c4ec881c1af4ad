"""Length-normalised DPO: each log-ratio over its own tokens, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from var.losses.dpo import DPO
from var.losses.dpo_norm import DPONorm
from var.needs import Need
from var.problems import UserError

# sequences: better (2 tokens), worse (1); better (1), worse (2)
LENGTHS = [2, 1, 1, 2]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5]
REFERENCE = [-2.0, -3.0, -4.5, -1.0, -2.0, -2.5]
# log-ratios: 2.0, 0.5 | −2.0, 2.0. Margins: 1.5, −4.0


def loss_and_gradient(loss, batch_of, **extra):
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    value, metrics = loss(logps, batch_of(LENGTHS, reference_logps=torch.tensor(REFERENCE), **extra))
    value.backward()
    return value.item(), logps.grad, {name: float(total / number) for name, (total, number) in metrics.items()}


def test_loss_and_gradient_by_hand(batch_of):
    """Log-ratios a token: 1, 0.5 | −2, 1. β = 2: margins 1, −6; −log σ: 0.3132617, 6.0024757.

    Gradient of a token: ∓β σ(−m)/(length · 2 pairs): σ(−1) = 0.2689414, σ(6) = 0.9975274.
    """
    value, gradient, metrics = loss_and_gradient(DPONorm(beta=2.0), batch_of)
    assert value == pytest.approx((0.3132616875 + 6.0024756851) / 2, rel=1e-9)
    a, b = 0.2689414214, 0.9975273768
    assert_close(gradient, torch.tensor([-a / 2, -a / 2, a, -b, b / 2, b / 2], dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics["implicit_reward/margin"] == pytest.approx((1 - 6) / 2)
    assert metrics["implicit_reward/accuracy"] == 0.5


def test_with_equal_lengths_it_is_dpo_at_beta_over_length(batch_of):
    torch.manual_seed(0)
    logps, reference = -torch.rand(2, 12, dtype=torch.float64)
    batch = batch_of([3, 3, 3, 3], reference_logps=reference)
    assert_close(DPONorm(beta=6.0)(logps, batch)[0], DPO(beta=2.0)(logps, batch)[0], rtol=1e-14, atol=0)


def test_pairs_of_a_step_add_up_over_micro_batches(batch_of):
    """The divisor is the step's pairs: two micro-batches of one pair sum to the whole."""
    whole, _, _ = loss_and_gradient(DPONorm(beta=2.0), batch_of)
    total = 0.0
    for sequences, tokens in ((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 6))):
        batch = batch_of(LENGTHS[sequences], reference_logps=torch.tensor(REFERENCE[tokens]), global_sequences=4.0)
        total += DPONorm(beta=2.0)(torch.tensor(LOGPS[tokens]).double(), batch)[0].item()
    assert total == pytest.approx(whole, rel=1e-15)


def test_needs_pairs_and_the_reference():
    assert DPONorm().needs == {Need.PAIRS, Need.REFERENCE_LOGPS}


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_wrong_settings_say_what_is_allowed(beta):
    with pytest.raises(UserError) as error:
        DPONorm(beta=beta)
    assert str(error.value) == "loss.beta is β > 0"
