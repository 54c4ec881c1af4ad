"""ORPO: the chosen response's NLL and the odds ratio, by hand; log-odds of near-certain responses stay finite."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import LENGTHS, kinds, loss_and_gradient
from var.losses.orpo import ORPO, log_odds
from var.requirements import Pairs
from var.utils.errors import UserError


def test_loss_and_gradient_by_hand(batch_of):
    """log-odds a − log(1 − e^a) of the means a: −1.2475175, −3.9815146 | −2.9489308, −0.9124204. Differences d =
    2.7339970, −2.0365104; −log σ: 0.0629364, 2.1591556. NLL: 1.5, 3. β = 1/2: 1.5 + 0.0314682, 3 + 1.0795778.

    d log-odds/da = 1/(1 − e^a): 1.2872169, 1.0186574 | 1.0523957, 1.4015511; σ(−d): 0.0609968, 0.8845775. Gradient of
    a better response's token: −(1 + β σ(−d)/(1 − e^a))/(length · 2 pairs), of a worse one's the second term alone.
    """
    value, gradient, metrics = loss_and_gradient(ORPO(beta=0.5), batch_of(LENGTHS))
    assert value == pytest.approx((1.5314682103 + 4.0795777918) / 2, rel=1e-9)
    a, b = 0.0609968270 * 1.2872169168, 0.0609968270 * 1.0186573604
    c, d = 0.8845774554 * 1.0523956965, 0.8845774554 * 1.4015511185
    better, other = -(1 + a / 2) / 4, -(1 + c / 2) / 2
    expected = torch.tensor([better, better, b / 4, other, d / 8, d / 8], dtype=torch.float64)
    assert_close(gradient, expected, rtol=1e-8, atol=0)
    assert metrics == pytest.approx(
        {
            "nll": 12.5 / 6, "nll/chosen": 2.25, "logps/chosen": -3.0, "logps/rejected": -3.25,
            "implicit_reward/margin": (2.7339970121 - 2.0365103841) / 2, "implicit_reward/accuracy": 0.5,
        }
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_keep_their_accuracy_from_certain_to_impossible(dtype):
    """p near 1: e^−s has odds 1/s − 1/2 + s/12 for small s; p = 1/2: 0; p near 0: the log-odds are the log-probability.
    A float32 1 − e^−s would be off by 6% at s = 1e-6."""
    small = torch.tensor([1e-6, 1e-3], dtype=dtype).double()  # the rounded values
    logps = torch.tensor([-1e-6, -1e-3, -math.log(2), -60.0, -1e4], dtype=dtype)
    near_one = (1 / small - 0.5 + small / 12).log().tolist()
    expected = torch.tensor([*near_one, 0.0, -60.0, -1e4], dtype=dtype)
    assert_close(log_odds(logps), expected, rtol=4 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("certain", [0, 1, 2])
def test_long_near_certain_responses_have_a_finite_loss_and_gradient(batch_of, certain):
    """Each of 300 tokens has log-probability 0, as float32 rounds it: the odds are infinite, in the better response,
    the worse one or both. Loss and gradient stay finite, and a certain response gets nothing from the odds ratio."""
    chances = [torch.zeros(300), -torch.rand(200)]
    parts = [chances[certain == 1], chances[certain == 0]] if certain < 2 else [torch.zeros(300), torch.zeros(200)]
    logps = torch.cat(parts).requires_grad_(True)
    loss, metrics = ORPO(beta=1.0)(logps, batch_of([len(part) for part in parts]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(logps.grad.isfinite().all())
    first = logps.grad[: len(parts[0])]
    if certain != 1:
        assert_close(first, torch.full((300,), -1 / 300))  # the NLL's
    if certain:
        assert_close(logps.grad[len(first) :], torch.zeros(len(parts[1])))
    assert all(math.isfinite(float(total)) for total, _ in metrics.values())


def test_a_probability_within_rounding_of_1_counts_as_1_less_eps():
    """−1e-9 in float32: its odds would be 1e9 and its gradient with them; the number itself is no better than 1e-7."""
    logps = torch.tensor([-1e-9, -1e-6], requires_grad=True)
    odds = log_odds(logps)
    odds.sum().backward()
    assert odds[0].item() == pytest.approx(-math.log(torch.finfo(torch.float32).eps), rel=1e-6)
    assert_close(logps.grad, torch.tensor([0.0, 1e6]), rtol=1e-5, atol=0)


def test_a_rejected_response_near_certain_in_float32_agrees_with_float64(batch_of):
    """1 − p = 1e-4 a token, over 500 tokens: nothing overflows, and float32 is right to its rounding."""
    found = []
    for dtype in (torch.float32, torch.float64):
        logps = torch.cat([torch.full((3,), -2.0), torch.full((500,), -1e-4)]).to(dtype).requires_grad_(True)
        loss, _ = ORPO(beta=1.0)(logps, batch_of([3, 500]))
        loss.backward()
        found.append((loss.detach().double(), logps.grad.double()))
    assert_close(found[0], found[1], rtol=2e-5, atol=0)


def test_needs_pairs_and_no_reference():
    assert kinds(ORPO()) == {Pairs}


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_wrong_settings_say_what_is_allowed(beta):
    with pytest.raises(UserError) as error:
        ORPO(beta=beta)
    assert str(error.value) == "loss.beta is λ > 0 of the paper; for 0 use loss=sft with data.responses=chosen"
