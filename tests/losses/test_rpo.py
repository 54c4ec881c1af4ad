"""RPO: DPO and the NLL of the chosen response per token of it, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from var.losses.rpo import RPO
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
    """β = 1/2: DPO's margins 0.75, −2, −log σ 0.3868710, 2.1269280. NLL per token of the better: 3/2 and 3/1; α = 1/4:
    0.375, 0.75. By token of both pairs it would be 6/3, and with the worse ones 12.5/6.

    Gradient of a better response's token: −(β σ(−m) + α/length)/2 pairs; of a worse one's: β σ(−m)/2.
    """
    value, gradient, metrics = loss_and_gradient(RPO(beta=0.5, alpha=0.25), batch_of)
    assert value == pytest.approx((0.3868710061 + 0.375 + 2.1269280110 + 0.75) / 2, rel=1e-9)
    a, b = 0.25 * 0.3208213008, 0.25 * 0.8807970780
    expected = [-a - 0.0625, -a - 0.0625, a, -b - 0.125, b, b]
    assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics["nll/chosen"] == pytest.approx(2.25)
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_pairs_of_a_step_add_up_over_micro_batches(batch_of):
    """The divisor is the step's pairs: two micro-batches of one pair sum to the whole."""
    whole, _, _ = loss_and_gradient(RPO(beta=0.5, alpha=0.25), batch_of)
    total = 0.0
    for sequences, tokens in ((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 6))):
        batch = batch_of(LENGTHS[sequences], reference_logps=torch.tensor(REFERENCE[tokens]), global_sequences=4.0)
        total += RPO(beta=0.5, alpha=0.25)(torch.tensor(LOGPS[tokens]).double(), batch)[0].item()
    assert total == pytest.approx(whole, rel=1e-15)


def test_needs_pairs_and_the_reference():
    assert RPO().needs == {Need.PAIRS, Need.REFERENCE_LOGPS}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"alpha": 0.0}, {"alpha": math.nan}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        RPO(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.alpha is α > 0; for α = 0 use loss=dpo"
