"""loss=weighted: the data's own weight column, a first-class loss; and the base of SFT and VAR."""

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.weighted import Weighted
from var.requirements import WeightColumn
from var.utils.errors import UserError

LOGPS = [-0.5, -2.0, -9.0]


def test_loss_and_gradient_by_hand(batch_of):
    """Σ w·nll = 2 · (0.5 + 2) + 0.25 · 9 = 7.25 over the step's 12 tokens; ∂L/∂logp_it = −w_i/12, whatever logp is."""
    batch = batch_of([2, 1], weights=torch.tensor([2.0, 0.25]), global_tokens=12.0)
    value, gradient, metrics = loss_and_gradient(Weighted(), batch, LOGPS)
    assert value == pytest.approx(7.25 / 12, rel=1e-14)
    assert_close(gradient, -torch.tensor([2.0, 2.0, 0.25], dtype=torch.float64) / 12)
    assert metrics == pytest.approx({"nll": 11.5 / 3, "weight/mean": 1.125, "weight/square": (4 + 1 / 16) / 2})


def test_normalize_sequence_divides_by_the_steps_sequences(batch_of):
    """7.25 over 5 sequences; the gradient of a token does not depend on its sequence's length."""
    logps = torch.tensor(LOGPS, requires_grad=True)
    batch = batch_of([2, 1], weights=torch.tensor([2.0, 0.25]), global_tokens=12.0, global_sequences=5.0)
    loss, _ = Weighted(normalize="sequence")(logps, batch)
    loss.backward()
    assert loss.item() == pytest.approx(1.45)
    assert_close(logps.grad, torch.tensor([-0.4, -0.4, -0.05]))


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_micro_batches_add_up_to_the_whole(batch_of, normalize):
    """Eighths and a divisor of 8 or 4: floating point is exact, so the two halves sum to the whole to the last bit."""
    lengths, logps = [3, 1, 2, 2], -torch.arange(1, 9).double() / 8
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25])
    step = dict(global_tokens=8.0, global_sequences=4.0)
    loss = Weighted(normalize=normalize)
    whole, _ = loss(logps, batch_of(lengths, weights=weights, **step))
    first, _ = loss(logps[:4], batch_of(lengths[:2], weights=weights[:2], **step))
    second, _ = loss(logps[4:], batch_of(lengths[2:], weights=weights[2:], **step))
    assert first + second == whole
    assert first != second


def test_the_weight_holds_no_gradient(batch_of):
    weights = torch.tensor([2.0, 0.25], requires_grad=True)
    logps = torch.tensor(LOGPS, requires_grad=True)
    Weighted()(logps, batch_of([2, 1], weights=weights))[0].backward()
    assert weights.grad is None


def test_a_row_of_weight_0_gives_nothing_but_its_tokens_still_count(batch_of):
    """The divisor counts tokens, not weighted tokens: (0.5 + 2)/3."""
    loss, _ = Weighted()(torch.tensor(LOGPS), batch_of([2, 1], weights=torch.tensor([1.0, 0.0])))
    assert loss.item() == pytest.approx(2.5 / 3)


def test_needs_the_weight_column():
    assert kinds(Weighted()) == {WeightColumn}


def test_another_normalize_is_refused():
    with pytest.raises(UserError) as error:
        Weighted(normalize="mean")
    assert str(error.value) == "loss.normalize is token or sequence, got mean"
