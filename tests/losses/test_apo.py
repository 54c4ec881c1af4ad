"""APO, zero and down: values and gradients by hand, and which way each moves a pair."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.apo import APO
from var.requirements import Pairs, ReferenceLogps
from var.utils.errors import UserError


def test_zero_by_hand(pairs):
    """β = 1/2: implicit rewards 1, 0.25 | −1, 1. (1 − σ(1)) + σ(0.25) = 0.2689414 + 0.5621765; (1 − σ(−1)) + σ(1) =
    2 · 0.7310586. Gradient of a token: ∓β σ'(implicit)/2 pairs, σ'(1) = 0.1966119, σ'(0.25) = 0.2461341."""
    value, gradient, metrics = loss_and_gradient(APO(beta=0.5, kind="zero"), pairs)
    assert value == pytest.approx((0.8311179223 + 1.4621171573) / 2, rel=1e-9)
    a, b = 0.25 * 0.1966119332, 0.25 * 0.2461340827
    assert_close(gradient, torch.tensor([-a, -a, b, -a, a, a], dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_down_by_hand(pairs):
    """σ(1) + 1 − σ(0.75) = 0.7310586 + 0.3208213; σ(−1) + 1 − σ(−2) = 0.2689414 + 0.8807971. Gradient: better
    β (σ'(implicit) − σ'(margin))/2, worse β σ'(margin)/2: σ'(0.75) = 0.2178950, σ'(2) = 0.1049936."""
    value, gradient, _ = loss_and_gradient(APO(beta=0.5, kind="down"), pairs)
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


def test_needs_pairs_and_the_reference():
    assert kinds(APO()) == {Pairs, ReferenceLogps}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"kind": "up"}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        APO(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.kind is zero or down"
