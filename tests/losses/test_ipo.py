"""IPO: the margin of log-ratios, summed (the paper) or averaged over tokens, regressed on 1/(2β)."""

import math

import pytest
import torch
from torch.testing import assert_close

from var.losses.ipo import IPO
from var.needs import Need
from var.problems import UserError

# log-ratios: better 2.0 over 2 tokens, worse 0.5 over 1 | better −2.0 over 1, worse 2.0 over 2
LENGTHS = [2, 1, 1, 2]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5]
REFERENCE = [-2.0, -3.0, -4.5, -1.0, -2.0, -2.5]


def test_summed_by_hand(batch_of):
    """β = 1/2: target 1. Margins 1.5, −4: (0.5² + 5²)/2 = 12.625. Gradient of a pair's margin: (h − 1): 0.5, −5."""
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    loss, metrics = IPO(beta=0.5)(logps, batch_of(LENGTHS, reference_logps=torch.tensor(REFERENCE)))
    loss.backward()
    assert loss.item() == 12.625
    assert_close(logps.grad, torch.tensor([0.5, 0.5, -0.5, -5, 5, 5], dtype=torch.float64))
    assert float(metrics["implicit_reward/margin"].total) == pytest.approx(0.5 * (1.5 - 4))


def test_averaged_by_hand(batch_of):
    """Margins 1 − 0.5 = 0.5 and −2 − 1 = −3: (0.25 + 16)/2 = 8.125. Gradient (h − 1)/length: −0.25, 0.5 | −4, 2."""
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    loss, _ = IPO(beta=0.5, reduction="mean")(logps, batch_of(LENGTHS, reference_logps=torch.tensor(REFERENCE)))
    loss.backward()
    assert loss.item() == 8.125
    assert_close(logps.grad, torch.tensor([-0.25, -0.25, 0.5, -4, 2, 2], dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_pairs_of_a_step_add_up_over_micro_batches(batch_of, reduction):
    loss, logps, reference = IPO(beta=0.5, reduction=reduction), torch.tensor(LOGPS), torch.tensor(REFERENCE)
    whole, _ = loss(logps, batch_of(LENGTHS, reference_logps=reference))
    first, _ = loss(logps[:3], batch_of(LENGTHS[:2], reference_logps=reference[:3], global_sequences=4.0))
    second, _ = loss(logps[3:], batch_of(LENGTHS[2:], reference_logps=reference[3:], global_sequences=4.0))
    assert first + second == whole


def test_step_0_is_the_squared_target(batch_of):
    """Policy = reference: (1/(2β))² = 25 at β = 1/10."""
    logps = -torch.rand(6)
    loss, _ = IPO()(logps, batch_of(LENGTHS, reference_logps=logps))
    assert loss.item() == pytest.approx(25.0)


def test_needs_pairs_and_the_reference():
    assert IPO().needs == {Need.PAIRS, Need.REFERENCE_LOGPS}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"reduction": "token"}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        IPO(**options)
    assert str(error.value) == "loss.beta is > 0 and loss.reduction is sum or mean"
