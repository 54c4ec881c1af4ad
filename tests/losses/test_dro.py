"""DRO-V: by hand, and its optimum with responses of any policy."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.groups import POPULATION, VALUES
from tests.helpers.losses import compute_means, double, make_batch
from var.losses.dro import DRO


def test_loss_and_gradients_match_hand_computation():
    """λ = 1/2: log-ratios 2 and −2, so errors are 1.5 − 0.25 − 1 = 0.25 and 0 + 0.5 + 1 = 1.5. V is the value before a
    response's first token; the others have no gradient."""
    logps = double([-1.0, -2.0, -3.0]).requires_grad_(True)
    values = double([0.25, 9.0, -0.5]).requires_grad_(True)
    batch = make_batch([2, 1], reference_logps=double([-2.0, -3.0, -1.0]), rewards=[1.5, 0.0], values=values)
    loss, metrics = DRO(temperature=0.5, value_weight=3.0)(logps, batch)
    loss.backward()
    half_squares = (0.25**2 + 1.5**2) / 2
    assert loss.item() == pytest.approx((half_squares / 0.5 + 3 * half_squares) / 2)
    assert_close(logps.grad, double([-0.125, -0.125, -0.75]))
    assert_close(values.grad, double([-0.375, 0.0, -2.25]))
    assert compute_means(metrics) == pytest.approx(
        {"nll": 2, "logps/sequence": -3, "value/mean": -0.125, "value/loss": half_squares / 2,
         "implicit_reward/mean": 0.0}
    )  # fmt: skip


def test_initial_value_is_added_to_the_heads():
    fields = {"reference_logps": double([-2.0, -1.0]), "rewards": [1.5, 0.0], "values": double([0.25, -0.5])}
    expected, _ = DRO(temperature=0.5)(double([-1.0, -3.0]), make_batch([1, 1], **fields))
    fields["values"] = fields["values"] - 0.75
    assert_close(
        DRO(temperature=0.5, initial_value=0.75)(double([-1.0, -3.0]), make_batch([1, 1], **fields))[0], expected
    )


@pytest.mark.parametrize("draws", [[0], [3, 1], [0, 1, 2, 3, 3]])
def test_loss_and_gradients_are_zero_at_the_optimum_and_its_log_partition(draws):
    """π_θ = π_ref exp(r/λ)/Z and V = λ log Z, for responses of any policy."""
    optimum = POPULATION.log() + VALUES / 0.7
    logps = optimum.log_softmax(0)[draws].requires_grad_(True)
    values = (0.7 * optimum.logsumexp(0)).expand(len(draws)).clone().requires_grad_(True)
    batch = make_batch([1] * len(draws), reference_logps=POPULATION.log()[draws], rewards=VALUES[draws], values=values)
    loss, _ = DRO(temperature=0.7)(logps, batch)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert_close((logps.grad, values.grad), (torch.zeros(len(draws)).double(),) * 2, rtol=0, atol=1e-14)
