"""APO, zero and down: values and gradients by hand, and which way each moves a pair."""

import math

import pytest
import torch
from torch.testing import assert_close

from var.losses.apo import APO
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


def test_zero_by_hand(batch_of):
    """β = 1/2: implicit rewards 1, 0.25 | −1, 1. (1 − σ(1)) + σ(0.25) = 0.2689414 + 0.5621765; (1 − σ(−1)) + σ(1) =
    2 · 0.7310586. Gradient of a token: ∓β σ'(implicit)/2 pairs, σ'(1) = 0.1966119, σ'(0.25) = 0.2461341."""
    value, gradient, metrics = loss_and_gradient(APO(beta=0.5, kind="zero"), batch_of)
    assert value == pytest.approx((0.8311179223 + 1.4621171573) / 2, rel=1e-9)
    a, b = 0.25 * 0.1966119332, 0.25 * 0.2461340827
    assert_close(gradient, torch.tensor([-a, -a, b, -a, a, a], dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_down_by_hand(batch_of):
    """σ(1) + 1 − σ(0.75) = 0.7310586 + 0.3208213; σ(−1) + 1 − σ(−2) = 0.2689414 + 0.8807971. Gradient: better
    β (σ'(implicit) − σ'(margin))/2, worse β σ'(margin)/2: σ'(0.75) = 0.2178950, σ'(2) = 0.1049936."""
    value, gradient, _ = loss_and_gradient(APO(beta=0.5, kind="down"), batch_of)
    assert value == pytest.approx((1.0518798795 + 1.1497384993) / 2, rel=1e-9)
    s, a, b = 0.25 * 0.1966119332, 0.25 * 0.2178949938, 0.25 * 0.1049935854
    assert_close(gradient, torch.tensor([s - a, s - a, a, s - b, b, b], dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("kind", "better"), [("zero", -1), ("down", 0)])
def test_step_0_is_1_and_raises_the_better_response_only_under_zero(batch_of, kind, better):
    """Policy = reference: 1/2 + 1/2. σ'(0) = 1/4: under `zero` the better one's slope is −β/4, under `down` its two
    terms cancel, and it falls once the margin grows; the worse one falls under both."""
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = APO(beta=0.5, kind=kind)(logps, batch_of([1, 1], reference_logps=torch.tensor([-1.0, -2.0])))
    loss.backward()
    assert loss.item() == 1.0
    assert_close(logps.grad, torch.tensor([0.125 * better, 0.125]))


def test_pairs_of_a_step_add_up_over_micro_batches(batch_of):
    """The divisor is the step's pairs: two micro-batches of one pair sum to the whole."""
    whole, _, _ = loss_and_gradient(APO(beta=0.5, kind="down"), batch_of)
    total = 0.0
    for sequences, tokens in ((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 6))):
        batch = batch_of(LENGTHS[sequences], reference_logps=torch.tensor(REFERENCE[tokens]), global_sequences=4.0)
        total += APO(beta=0.5, kind="down")(torch.tensor(LOGPS[tokens]).double(), batch)[0].item()
    assert total == pytest.approx(whole, rel=1e-15)


def test_needs_pairs_and_the_reference():
    assert APO().needs == {Need.PAIRS, Need.REFERENCE_LOGPS}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"kind": "up"}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        APO(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.kind is zero or down"
