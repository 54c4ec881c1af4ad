"""APO, zero and down: by hand, and which way each moves a pair."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import check_loss, make_batch, value_and_gradient
from var.losses.apo import APO


def test_zero_matches_hand_computation(pairs):
    """β = 1/2: implicit rewards 1, 0.25 | −1, 1. (1 − σ(1)) + σ(0.25) = 0.2689414 + 0.5621765 and
    (1 − σ(−1)) + σ(1) = 2 · 0.7310586. A token has gradient ∓β σ'(implicit)/2 pairs, with σ'(1) = 0.1966119 and
    σ'(0.25) = 0.2461341."""
    a, b = 0.25 * 0.1966119332, 0.25 * 0.2461340827
    value = (0.8311179223 + 1.4621171573) / 2
    metrics = check_loss(APO(beta=0.5, kind="zero"), pairs, value, [-a, -a, b, -a, a, a])
    assert metrics["implicit_reward/margin"] == pytest.approx((0.75 - 2) / 2)


def test_down_matches_hand_computation(pairs):
    """σ(1) + 1 − σ(0.75) = 0.7310586 + 0.3208213 and σ(−1) + 1 − σ(−2) = 0.2689414 + 0.8807971. A better response has
    gradient β (σ'(implicit) − σ'(margin))/2, a worse one β σ'(margin)/2, with σ'(0.75) = 0.2178950 and
    σ'(2) = 0.1049936."""
    s, a, b = 0.25 * 0.1966119332, 0.25 * 0.2178949938, 0.25 * 0.1049935854
    value = (1.0518798795 + 1.1497384993) / 2
    check_loss(APO(beta=0.5, kind="down"), pairs, value, [s - a, s - a, a, s - b, b, b], rtol=1e-7)


@pytest.mark.parametrize(("kind", "better"), [("zero", -1), ("down", 0)])
def test_only_zero_raises_the_better_response_at_the_reference(kind, better):
    """σ'(0) = 1/4: under `zero` the better response has slope −β/4. Under `down` its two terms cancel, and it falls
    once the margin grows. The worse response falls under both."""
    batch = make_batch([1, 1], reference_logps=[-1.0, -2.0])
    _, gradient = value_and_gradient(lambda x: APO(beta=0.5, kind=kind)(x, batch)[0], torch.tensor([-1.0, -2.0]))
    assert_close(gradient, torch.tensor([0.125 * better, 0.125]))
