"""SFT: the mean negative log-likelihood of the responses, which is VAR with w ≡ 1."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import check_loss, make_batch, value_and_gradient
from tests.helpers.weights import make_inputs
from var.losses.sft import SFT
from var.losses.var import VAR
from var.losses.weighted import Weighted
from var.requirements import Weights, find
from var.weights.estimators import Global, Grouped, Prompt, compute_weights


@pytest.mark.parametrize(("normalize", "divisor"), [("token", 3), ("sequence", 2)])
def test_loss_matches_hand_computation(normalize, divisor):
    """(0.5 + 2 + 9) per token or per sequence. The gradient of each token is −1 over the divisor."""
    batch = make_batch([2, 1])
    metrics = check_loss(SFT(normalize=normalize), batch, 11.5 / divisor, [-1 / divisor] * 3, [-0.5, -2.0, -9.0])
    assert metrics["nll"] == pytest.approx(11.5 / 3)


@pytest.mark.parametrize("estimator", [Grouped(drop_zero_variance=False), Global(), Prompt(baseline="zero"), None])
def test_equal_weights_give_sft_bit_for_bit(estimator):
    """Equal rewards: w ≡ 1 exactly for each estimator over the data set, so the loss and its gradient are SFT's."""
    torch.manual_seed(0)
    logps, loss, weights = torch.randn(40, 50).log_softmax(-1)[:, 0], Weighted(), torch.ones(8)
    if estimator:
        loss = VAR(estimator=estimator, temperature=0.7, temperature_unit="reward")
        inputs = make_inputs([0.3] * 8, [0, 1, 2, 3] * 2, length=[5] * 8)
        weights = compute_weights(find(loss.requires, Weights), inputs).float()
    batch = make_batch([5] * 8, weights=weights)
    found = value_and_gradient(lambda x: loss(x, batch)[0], logps)
    assert_close(found, value_and_gradient(lambda x: SFT()(x, batch)[0], logps), rtol=0, atol=0)
