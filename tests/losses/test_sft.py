"""SFT: the mean negative log-likelihood of the responses; VAR with w ≡ 1."""

import pytest
import torch
from torch.testing import assert_close
from var.weights.table import Table

from var.losses.sft import SFT
from var.losses.var import VAR
from var.losses.weighted import Weighted
from var.utils.errors import UserError
from var.weights.estimators import Global, Grouped, Prompt


def test_loss_and_gradient_by_hand(batch_of):
    """(0.5 + 2 + 9)/3 by token, 11.5/2 by sequence; each token's gradient is −1 over the divisor."""
    for normalize, divisor in (("token", 3), ("sequence", 2)):
        logps = torch.tensor([-0.5, -2.0, -9.0], requires_grad=True)
        loss, metrics = SFT(normalize=normalize)(logps, batch_of([2, 1]))
        loss.backward()
        assert loss.item() == pytest.approx(11.5 / divisor)
        assert_close(logps.grad, torch.full((3,), -1 / divisor))
        assert metrics["nll"] == (11.5, 3.0)


def test_var_and_weighted_with_equal_weights_are_sft_to_the_last_bit(batch_of):
    """Equal rewards: w ≡ 1 exactly for each estimator over the data set, so the loss and its gradient are SFT's."""
    torch.manual_seed(0)
    raw = torch.randn(40, 50).log_softmax(-1)[:, 0]
    table = Table(rewards=torch.full((8,), 0.3).double(), group=torch.arange(4).repeat(2), length=torch.full((8,), 5))
    losses = [(SFT(), None), (Weighted(), torch.ones(8))]
    for estimator in (Grouped(), Global(), Prompt(baseline="zero")):
        loss = VAR(estimator=estimator, temperature=0.7)
        losses.append((loss, loss.weights(table).float()))
    found = []
    for loss, weights in losses:
        logps = raw.clone().requires_grad_(True)
        value, _ = loss(logps, batch_of([5] * 8, weights=weights))
        value.backward()
        found.append((value, logps.grad))
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_micro_batches_add_up_to_the_whole(batch_of):
    logps = -torch.arange(1, 9).double() / 8
    step = dict(global_tokens=8.0, global_sequences=3.0)
    whole, _ = SFT()(logps, batch_of([5, 1, 2], **step))
    parts = [SFT()(logps[:5], batch_of([5], **step))[0], SFT()(logps[5:], batch_of([1, 2], **step))[0]]
    assert parts[0] + parts[1] == whole == 4.5 / 8


def test_needs_nothing_and_refuses_another_normalize():
    assert SFT().needs == frozenset()
    with pytest.raises(UserError) as error:
        SFT(normalize="batch")
    assert str(error.value) == "loss.normalize is token or sequence, got batch"
