"""The hinge on the log-ratio margin: values and gradients by hand, on both sides of its corner."""

import math

import pytest
import torch
from torch.testing import assert_close

from var.losses.hinge import Hinge
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
    """β = 1/2: 1 − 0.75 = 0.25 and 1 + 2 = 3; their mean 1.625. Gradient of a better response's token −β/2 pairs."""
    value, gradient, metrics = loss_and_gradient(Hinge(beta=0.5), batch_of)
    assert value == 1.625
    assert_close(gradient, torch.tensor([-0.25, -0.25, 0.25, -0.25, 0.25, 0.25], dtype=torch.float64))
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_a_margin_above_its_target_trains_no_more(batch_of):
    """β = 1: the target is 1, the margins 1.5 and −4: 0 and 5; the first pair has no gradient."""
    value, gradient, _ = loss_and_gradient(Hinge(beta=1.0), batch_of)
    assert value == 2.5
    assert_close(gradient, torch.tensor([0.0, 0.0, 0.0, -0.5, 0.5, 0.5], dtype=torch.float64))


def test_pairs_of_a_step_add_up_over_micro_batches(batch_of):
    """The divisor is the step's pairs: two micro-batches of one pair sum to the whole."""
    whole, _, _ = loss_and_gradient(Hinge(beta=0.5), batch_of)
    total = 0.0
    for sequences, tokens in ((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 6))):
        batch = batch_of(LENGTHS[sequences], reference_logps=torch.tensor(REFERENCE[tokens]), global_sequences=4.0)
        total += Hinge(beta=0.5)(torch.tensor(LOGPS[tokens]).double(), batch)[0].item()
    assert total == pytest.approx(whole, rel=1e-15)


def test_needs_pairs_and_the_reference():
    assert Hinge().needs == {Need.PAIRS, Need.REFERENCE_LOGPS}


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_wrong_settings_say_what_is_allowed(beta):
    with pytest.raises(UserError) as error:
        Hinge(beta=beta)
    assert str(error.value) == "loss.beta is > 0"
