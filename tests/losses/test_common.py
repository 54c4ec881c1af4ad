"""Parts that several losses share: the clipped surrogate and the KL estimate."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import double, make_batch
from var.losses.common import clipped_surrogate, kl_estimate


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
