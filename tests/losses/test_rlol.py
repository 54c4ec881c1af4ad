"""R-LoL: reward times clipped ratio times NLL, values and gradients by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.rlol import RLoL
from var.losses.wbc import WBC
from var.requirements import ReferenceLogps, Rewards
from var.utils.errors import UserError

# token ratios 2, 1/4 | 3 | 1/2, 6/5: of whole sequences 1/2, 3, 3/5
LENGTHS = [2, 1, 2]
LOGPS = [-1.0, -2.0, -5.0, -0.5, -1.5]
REFERENCE = [logp - math.log(ratio) for logp, ratio in zip(LOGPS, [2, 0.25, 3, 0.5, 1.2], strict=True)]
REWARDS = [0.5, 2.0, 1.5]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def of_all(loss, batch_of, **extra):
    batch = batch_of(LENGTHS, reference_logps=tensor(REFERENCE), rewards=tensor(REWARDS), **extra)
    return loss_and_gradient(loss, batch, LOGPS)


def test_the_sequence_ratio_by_hand(batch_of):
    """ε = 0.2: ρ 0.5 → 0.8, 3 → 1.2, 0.6 → 0.8. Rρ: 0.4, 2.4, 1.2; NLL 3, 5, 2: 1.2 + 12 + 2.4 = 15.6, over 3."""
    value, gradient, metrics = of_all(RLoL(clip=0.2), batch_of)
    assert value == pytest.approx(15.6 / 3, rel=1e-12)
    assert_close(gradient, -tensor([0.4, 0.4, 2.4, 1.2, 1.2]) / 3)
    assert metrics == pytest.approx(
        {
            "nll": 2.0, "logps/sequence": -10 / 3, "ratio/mean": 2.8 / 3, "ratio/clipped": 1.0, "weight/mean": 4 / 3,
        }
    )  # fmt: skip


def test_the_token_ratio_by_hand(batch_of):
    """ε = 0.9: ρ_t 1.9, 0.25 | 1.9 | 0.5, 1.2. 0.95 · 1 + 0.125 · 2 + 3.8 · 5 + 0.75 · 0.5 + 1.8 · 1.5 = 23.275."""
    value, gradient, metrics = of_all(RLoL(ratio="token", clip=0.9), batch_of, global_sequences=7.0)
    assert value == pytest.approx(23.275 / 7, rel=1e-12)
    assert_close(gradient, -tensor([0.95, 0.125, 3.8, 0.75, 1.8]) / 7)
    assert metrics["ratio/clipped"] == pytest.approx(2 / 5)


def test_without_a_clip(batch_of):
    """Rρ: 0.25, 6, 0.9: 0.75 + 30 + 1.8, over 3."""
    assert of_all(RLoL(clip=None), batch_of)[0] == pytest.approx(32.55 / 3, rel=1e-12)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_micro_batches_add_up_to_the_whole(batch_of, ratio):
    loss = RLoL(ratio=ratio)
    whole, _, _ = of_all(loss, batch_of)
    parts = [
        loss(
            tensor(LOGPS[tokens]),
            batch_of(
                LENGTHS[sequences], reference_logps=tensor(REFERENCE[tokens]), rewards=tensor(REWARDS[sequences]),
                global_sequences=3.0,
            ),
        )[0].item()
        for sequences, tokens in ((slice(0, 2), slice(0, 3)), (slice(2, 3), slice(3, 5)))
    ]  # fmt: skip
    assert sum(parts) == pytest.approx(whole, rel=1e-14)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_at_the_reference_it_is_weighted_behaviour_cloning(batch_of, ratio):
    """ρ = 1, so value and gradient are R · NLL's."""
    logps = tensor(LOGPS).requires_grad_(True)
    batch = batch_of(LENGTHS, reference_logps=tensor(LOGPS), rewards=tensor(REWARDS))
    gradients = []
    for loss in (RLoL(ratio=ratio), WBC()):
        value, _ = loss(logps, batch)
        assert value.item() == pytest.approx((0.5 * 3 + 2 * 5 + 1.5 * 2) / 3, rel=1e-14)
        gradients.append(torch.autograd.grad(value, logps)[0])
    assert_close(*gradients, rtol=1e-14, atol=0)


def test_a_negative_reward_is_refused(batch_of):
    with pytest.raises(UserError, match=r"one is -0\.25; weights must not be negative: set reward_scale=sigmoid"):
        RLoL()(tensor(LOGPS), batch_of(LENGTHS, reference_logps=tensor(REFERENCE), rewards=tensor([0.5, -0.25, 1])))


def test_needs_rewards_and_the_reference():
    assert kinds(RLoL()) == {Rewards, ReferenceLogps}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "none"}, "loss.ratio is sequence or token here; without a ratio this is loss=wbc"),
        ({"ratio": "none", "clip": None}, "loss.ratio is sequence or token here; without a ratio this is loss=wbc"),
        (
            {"clip": -0.1},
            "loss.ratio is sequence, token or none; loss.clip is ε > 0, or null, as it is with ratio none",
        ),
    ],
)
def test_wrong_settings_say_what_is_allowed(options, message):
    with pytest.raises(UserError) as error:
        RLoL(**options)
    assert str(error.value) == message
