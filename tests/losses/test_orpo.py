"""ORPO: the chosen response's NLL and the odds ratio, by hand. Log-odds of near-certain responses stay finite."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.losses import LENGTHS, check_loss, make_batch, value_and_gradient
from var.losses.orpo import ORPO, log_odds


def test_loss_matches_hand_computation():
    """The means a have log-odds a − log(1 − e^a) = −1.2475175, −3.9815146 | −2.9489308, −0.9124204. Their differences
    d = 2.7339970, −2.0365104 have −log σ = 0.0629364, 2.1591556. The NLL is 1.5 and 3. β = 1/2: 1.5 + 0.0314682 and
    3 + 1.0795778.

    d log-odds/da = 1/(1 − e^a) = 1.2872169, 1.0186574 | 1.0523957, 1.4015511, and σ(−d) = 0.0609968, 0.8845775. A token
    of a better response has gradient −(1 + β σ(−d)/(1 − e^a))/(length · 2 pairs), one of a worse response only the
    second term.
    """
    a, b = 0.0609968270 * 1.2872169168, 0.0609968270 * 1.0186573604
    c, d = 0.8845774554 * 1.0523956965, 0.8845774554 * 1.4015511185
    first, second = -(1 + a / 2) / 4, -(1 + c / 2) / 2
    value, gradient = (1.5314682103 + 4.0795777918) / 2, [first, first, b / 4, second, d / 8, d / 8]
    metrics = check_loss(ORPO(beta=0.5), make_batch(LENGTHS), value, gradient, rtol=1e-8)
    assert metrics == pytest.approx(
        {
            "nll": 12.5 / 6, "nll/chosen": 2.25, "logps/chosen": -3.0, "logps/rejected": -3.25,
            "implicit_reward/margin": (2.7339970121 - 2.0365103841) / 2, "implicit_reward/accuracy": 0.5,
        }
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_accurate_for_all_probabilities(dtype):
    """p near 1: e^−s has odds 1/s − 1/2 + s/12 for small s. p = 1/2: 0. p near 0: the log-odds are the log-probability.
    In float32, 1 − e^−s would be off by 6 % at s = 1e-6."""
    small = torch.tensor([1e-6, 1e-3], dtype=dtype).double()  # the rounded values
    logps = torch.tensor([-1e-6, -1e-3, -math.log(2), -60.0, -1e4], dtype=dtype)
    near_one = (1 / small - 0.5 + small / 12).log().tolist()
    expected = torch.tensor([*near_one, 0.0, -60.0, -1e4], dtype=dtype)
    assert_close(log_odds(logps), expected, rtol=4 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("certain", ["better", "worse", "both"])
def test_certain_responses_have_a_finite_loss_and_gradient(certain):
    """Each of up to 300 tokens has log-probability 0, as float32 rounds it, so the odds are infinite. Loss and gradient
    stay finite, and a certain response has no gradient from the odds ratio."""
    better = torch.zeros(300) if certain != "worse" else -torch.rand(200)
    worse = torch.zeros(300 if certain == "worse" else 200) if certain != "better" else -torch.rand(200)
    logps = torch.cat([better, worse]).requires_grad_(True)
    loss, metrics = ORPO(beta=1.0)(logps, make_batch([len(better), len(worse)]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(logps.grad.isfinite().all())
    if certain != "worse":
        assert_close(logps.grad[: len(better)], torch.full((300,), -1 / 300))  # the gradient of the NLL
    if certain != "better":
        assert_close(logps.grad[len(better) :], torch.zeros(len(worse)))
    assert all(math.isfinite(float(total)) for total, _ in metrics.values())


def test_probability_within_rounding_of_1_counts_as_1_minus_eps():
    """−1e-9 in float32 would have odds of 1e9, and a gradient of that size. The number itself is accurate to 1e-7."""
    logps = torch.tensor([-1e-9, -1e-6])
    assert log_odds(logps)[0].item() == pytest.approx(-math.log(torch.finfo(torch.float32).eps), rel=1e-6)
    _, gradient = value_and_gradient(lambda x: log_odds(x).sum(), logps)
    assert_close(gradient, torch.tensor([0.0, 1e6]), rtol=1e-5, atol=0)


def test_float32_agrees_with_float64_on_a_near_certain_response():
    """1 − p = 1e-4 per token, over 500 tokens: nothing overflows, and float32 is right to its rounding."""
    logps, batch = torch.cat([torch.full((3,), -2.0), torch.full((500,), -1e-4)]), make_batch([3, 500])
    single, double = (
        value_and_gradient(lambda x: ORPO(beta=1.0)(x, batch)[0], logps.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert_close(single[0].double(), double[0], rtol=2e-5, atol=0)
    assert_close(single[1].double(), double[1], rtol=2e-5, atol=0)
