"""Parts that several losses share: the clipped surrogate, the importance-weighted NLL and the KL estimate."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import double, make_batch, value_and_gradient
from var.losses.common import clipped_surrogate, importance_weighted_nll, kl_estimate


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 2.0, -2.6, 0.0, 1), (0.5, 2.0, -1.0, -1.0, 0), (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, -2.0, 3.0, 3.0, 0), (0.5, -2.0, 1.6, 0.0, 1), (0.9, -2.0, 1.8, 1.8, 0), (0.5, 0.0, 0.0, 0.0, 0),
    ],
)  # fmt: skip
def test_each_side_of_the_clip(ratio, advantage, loss, gradient, clipped):
    """Clipped at 0.8 and 1.3, if that lowers the objective: −min(ρA, clip(ρ)A), with gradient −ρA or 0."""
    log_ratio = double([ratio]).log().requires_grad_(True)
    losses, metrics = clipped_surrogate(log_ratio, double([advantage]), 0.2, 0.3)
    losses.sum().backward()
    assert_close((losses.detach(), log_ratio.grad), (double([loss]), double([gradient])), rtol=1e-12, atol=1e-15)
    assert metrics["ratio/clipped"] == (clipped, 1.0)


def test_small_kl_is_not_rounded_away():
    """float32, d = 1e-4: e^d − d − 1 = d²/2 + d³/6 = 5.00017e-9, of which exp(d) − 1 − d would keep no digit."""
    batch = make_batch([1], reference_logps=[1e-4])
    assert kl_estimate(torch.zeros(1), batch).item() == pytest.approx(5.00017e-9, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "low", "loss", "gradient"),
    [
        (1e3, 2.0, 0.2, -2.6, 0.0), (1e3, 0.0, 0.2, 0.0, 0.0), (-1e3, 2.0, 0.2, 0.0, 0.0), (-1e3, -2.0, 0.2, 1.6, 0.0),
        (-1e3, -2.0, 1.0, 0.0, 0.0), (-math.inf, 2.0, 0.2, 0.0, 0.0), (80.0, 2.0, 1.0, -2.6, 0.0),
        (80.0, -2.0, 1.0, 2 * math.exp(80), 2 * math.exp(80)),
    ],
)  # fmt: skip
def test_extreme_ratios_have_the_exact_loss_and_gradient(dtype, log_ratio, advantage, low, loss, gradient):
    """exp(1e3) overflows. A clipped ratio still has gradient 0, and an advantage of 0 has loss and gradient 0."""
    log_ratios = torch.tensor([log_ratio], dtype=dtype)
    found = value_and_gradient(
        lambda x: clipped_surrogate(x, torch.tensor([advantage], dtype=dtype), low, 0.3)[0].sum(), log_ratios
    )
    assert torch.stack([found[0], found[1][0]]).tolist() == pytest.approx([loss, gradient], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overflowing_ratios_with_negative_advantages_are_finite(dtype):
    """Nothing clips them. Gradients keep their sign and stay huge, so a step that cannot use them is noticed."""
    advantages, largest = torch.tensor([-0.5, -30.0, -1e4], dtype=dtype), torch.finfo(dtype).max
    value, gradient = value_and_gradient(
        lambda x: clipped_surrogate(x, advantages, 0.2, 0.3)[0].sum(), torch.full((3,), 1e3, dtype=dtype)
    )
    assert (value.item() / largest) == pytest.approx(2.5 / 12, rel=1e-3)
    assert (gradient / largest).tolist() == pytest.approx([0.5 / 12, 1 / 12, 1 / 12], rel=1e-3)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_overflowing_unclipped_weight_times_a_certain_token_is_not_nan(ratio):
    """ρ overflows, and the log-probability of the second token is 0. Responses of coefficient 0 have loss 0."""
    batch = make_batch([2, 1], reference_logps=[-1e3, -1e3, -1e3])
    coefficients, logps = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0, -1.0])
    value, gradient = value_and_gradient(
        lambda x: importance_weighted_nll(x, coefficients, batch, ratio, None)[0], logps
    )
    assert value.item() == 0
    assert gradient[2].item() == 0
    assert bool((gradient[:2] < -1e36).all())
    assert bool(gradient.isfinite().all())
