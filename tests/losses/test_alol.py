"""A-LoL and its forms by hand, R-LoL's minimisers over a table of responses beside it."""

import math
from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close
from var.annotate.value_head import ValueHead

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.alol import ALoL
from var.losses.wbc import WBC
from var.requirements import Advantages, ReferenceLogps
from var.utils.errors import UserError

VALUE = ValueHead(
    development_prompts=8, epochs=1, learning_rate=1e-3, heads=2, batch=4, lowest=0.0, largest=1.0, seed=0
)
# token ratios 2, 1/4 | 3 | 1/2, 1/25, 3/2 | 7/10: of whole sequences 1/2, 3, 3/100, 7/10
LENGTHS = [2, 1, 3, 1]
LOGPS = [-1.0, -2.0, -3.0, -0.5, -1.0, -1.5, -4.0]
RATIOS = [2, 0.25, 3, 0.5, 0.04, 1.5, 0.7]
REFERENCE = [logp - math.log(ratio) for logp, ratio in zip(LOGPS, RATIOS, strict=True)]
ADVANTAGES = [1.5, 0.25, 0.5, -2.0]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def of_all(loss, batch_of, **extra):
    batch = batch_of(LENGTHS, reference_logps=tensor(REFERENCE), advantages=tensor(ADVANTAGES), **extra)
    return loss_and_gradient(loss, batch, LOGPS)


def test_the_sequence_ratio_by_hand(batch_of):
    """ε = 0.9: ρ 0.5, 3 → 1.9, 0.03 → 0.1, 0.7. A⁺ρ: 0.75, 0.475, 0.05, 0; each response's NLL is 3 but the last's.

    (0.75 + 0.475 + 0.05) · 3 over the step's 5 sequences. The gradient is −A⁺ρ/5 where ρ is clipped, too.
    """
    value, gradient, metrics = of_all(ALoL(value=VALUE, clip=0.9), batch_of, global_sequences=5.0)
    assert value == pytest.approx(3.825 / 5, rel=1e-12)
    assert_close(gradient, -tensor([0.75, 0.75, 0.475, 0.05, 0.05, 0.05, 0.0]) / 5)
    assert metrics == pytest.approx(
        {
            "nll": 13 / 7, "logps/sequence": -13 / 4, "advantage/positive": 0.75,
            "ratio/mean": (0.5 + 1.9 + 0.1 + 0.7) / 4, "ratio/clipped": 0.5,
        }
    )  # fmt: skip


def test_without_a_clip_the_ratio_is_as_it_is(batch_of):
    """A⁺ρ: 0.75, 0.75, 0.015: times 3, over 4."""
    value, gradient, metrics = of_all(ALoL(value=VALUE, clip=None), batch_of)
    assert value == pytest.approx(1.515 * 3 / 4, rel=1e-12)
    assert_close(gradient, -tensor([0.75, 0.75, 0.75, 0.015, 0.015, 0.015, 0.0]) / 4)
    assert metrics["ratio/mean"] == pytest.approx((0.5 + 3 + 0.03 + 0.7) / 4)
    assert metrics["ratio/clipped"] == 0


def test_a_negative_advantage_pushes_down_unless_clamped(batch_of):
    """A as it is adds −2 · 0.7 · 4 to the sum 3.825, and its token's gradient is +1.4/4."""
    value, gradient, _ = of_all(ALoL(value=VALUE, clip=0.9, clamp=False, draw="all"), batch_of)
    assert value == pytest.approx((3.825 - 5.6) / 4, rel=1e-12)
    assert_close(gradient, tensor([-0.75, -0.75, -0.475, -0.05, -0.05, -0.05, 1.4]) / 4)


def test_the_token_ratio_by_hand(batch_of):
    """ρ_t: 2 → 1.9, 0.25 | 3 → 1.9 | 0.5, 0.04 → 0.1, 1.5 | 0.7, times A⁺ = 1.5, 0.25, 0.5, 0.

    2.85 · 1 + 0.375 · 2 + 0.475 · 3 + 0.25 · 0.5 + 0.05 · 1 + 0.75 · 1.5 = 6.325.
    """
    value, gradient, metrics = of_all(ALoL(value=VALUE, ratio="token", clip=0.9), batch_of)
    assert value == pytest.approx(6.325 / 4, rel=1e-12)
    assert_close(gradient, -tensor([2.85, 0.375, 0.475, 0.25, 0.05, 0.75, 0.0]) / 4)
    assert metrics["ratio/mean"] == pytest.approx((1.9 + 0.25 + 1.9 + 0.5 + 0.1 + 1.5 + 0.7) / 7)
    assert metrics["ratio/clipped"] == pytest.approx(3 / 7)


def test_reference_free_by_hand(batch_of):
    """ρ = 1: (1.5 + 0.25 + 0.5) · 3 over 4. No ratio is taken, so none is reported."""
    value, gradient, metrics = of_all(ALoL(value=VALUE, ratio="none", clip=None), batch_of)
    assert value == pytest.approx(6.75 / 4, rel=1e-12)
    assert_close(gradient, -tensor([1.5, 1.5, 0.25, 0.5, 0.5, 0.5, 0.0]) / 4)
    assert set(metrics) == {"nll", "logps/sequence", "advantage/positive"}


@pytest.mark.parametrize("clamp", [True, False])
def test_the_kl_form_makes_the_coefficient_the_advantage_less_beta(batch_of, clamp):
    """β = 3/4: value 6.75 + β Σ log ρ, Σ log ρ = log(0.5 · 3 · 0.03 · 0.7); gradient −(A⁺ − β)/4 a token.

    A⁺ − β = 0.75, −0.5, −0.25, −0.75: of four answers, two of positive advantage among them, three are pushed down.
    Unclamped the last one's is −2.75, and −2 · 4 comes to the value.
    """
    loss = ALoL(value=VALUE, ratio="none", clip=None, beta=0.75, clamp=clamp, draw="all")
    value, gradient, _ = of_all(loss, batch_of)
    last = -0.75 if clamp else -2.75
    total = 6.75 + 0.75 * math.log(0.5 * 3 * 0.03 * 0.7) - (0 if clamp else 8)
    assert value == pytest.approx(total / 4, rel=1e-12)
    assert_close(gradient, -tensor([0.75, 0.75, -0.5, -0.25, -0.25, -0.25, last]) / 4)


FORMS = {
    "sequence": {"clip": 0.9},
    "token": {"ratio": "token", "clip": 0.9},
    "none": {"ratio": "none", "clip": None},
    "kl": {"ratio": "none", "clip": None, "beta": 0.75},
}


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_add_up_to_the_whole(batch_of, form):
    loss = ALoL(value=VALUE, **FORMS[form])
    whole, _, metrics = of_all(loss, batch_of)
    parts, totals = [], dict.fromkeys(metrics, (0.0, 0.0))
    for sequences, tokens in ((slice(0, 1), slice(0, 2)), (slice(1, 4), slice(2, 7))):
        batch = batch_of(
            LENGTHS[sequences], global_sequences=4.0, advantages=tensor(ADVANTAGES[sequences]),
            reference_logps=tensor(REFERENCE[tokens]),
        )  # fmt: skip
        part, found = loss(tensor(LOGPS[tokens]), batch)
        parts.append(part.item())
        totals = {name: (totals[name][0] + total, totals[name][1] + n) for name, (total, n) in found.items()}
    assert sum(parts) == pytest.approx(whole, rel=1e-14)
    assert {name: float(total / n) for name, (total, n) in totals.items()} == pytest.approx(metrics)


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_at_the_reference_the_forms_with_a_ratio_are_the_reference_free_one(batch_of, form):
    """π_θ = π_ref: ρ is 1 to the last bit, for stored log-probabilities in float32 beside a policy in float32."""
    torch.manual_seed(0)
    logps = -torch.rand(7)
    batch = batch_of(LENGTHS, reference_logps=logps.clone(), advantages=tensor(ADVANTAGES))
    free, _ = ALoL(value=VALUE, **FORMS["none"])(logps, batch)
    loss, metrics = ALoL(value=VALUE, **FORMS[form])(logps, batch)
    assert loss == free
    assert loss.dtype == torch.float32
    assert metrics["ratio/mean"].total == metrics["ratio/mean"].number


def test_advantages_and_ratio_hold_no_gradient(batch_of):
    advantages, reference = tensor(ADVANTAGES).requires_grad_(True), tensor(REFERENCE).requires_grad_(True)
    logps = tensor(LOGPS).requires_grad_(True)
    loss, _ = ALoL(value=VALUE)(logps, batch_of(LENGTHS, advantages=advantages, reference_logps=reference))
    loss.backward()
    assert advantages.grad is None
    assert reference.grad is None


# --- over a table of responses


SHARES = [1, 2, 3, 4]  # π_ref, in tenths: so often does a response stand in the enumeration
RESPONSE_LENGTHS = [1, 2, 1, 3]


def minimiser(loss, batch_of, repeats, **per_response):
    """π over the responses that minimises the loss where response k comes repeats[k] times; π is softmax of a table."""
    rows = [k for k, count in enumerate(repeats) for _ in range(count)]
    columns = {name: tensor([values[k] for k in rows]) for name, values in per_response.items()}
    batch = batch_of([RESPONSE_LENGTHS[k] for k in rows], **columns)
    response, lengths = torch.tensor(rows)[batch.sequence], torch.tensor(RESPONSE_LENGTHS[: len(repeats)])
    table = torch.zeros(len(repeats), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logps = (table.log_softmax(0) / lengths)[response]  # a token's share of log π(y)
        value, _ = loss(logps, batch)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach().softmax(0)


def test_wbc_ends_at_the_reference_times_reward(batch_of):
    """R-LoL with ρ = 1 (the VAR paper's A.1): π ∝ π_ref R, tenths 1 · 0.5, 2 · 1, 3 · 2, 4 · 0.25, over 9.5."""
    found = minimiser(WBC(), batch_of, SHARES, rewards=[0.5, 1, 2, 0.25])
    assert_close(found, tensor([0.5, 2, 6, 1]) / 9.5, rtol=0, atol=1e-8)


def test_close_rewards_are_told_apart_in_proportion(batch_of):
    """Rewards 1 and 0.9 end up 1/0.9 = 1.11 apart: linear in the reward."""
    found = minimiser(WBC(), batch_of, [1, 1], rewards=[1.0, 0.9])
    assert float(found[0] / found[1]) == pytest.approx(1 / 0.9, rel=1e-6)


def test_reference_free_ends_at_the_reference_times_positive_advantage(batch_of):
    """π ∝ π_ref A⁺: 1 · 1.5, 0, 3 · 0.75, 4 · 0.25 of 4.75. Nothing is left for the answer below V."""
    loss = ALoL(value=VALUE, ratio="none", clip=None, draw="all")
    found = minimiser(loss, batch_of, SHARES, advantages=[1.5, -0.5, 0.75, 0.25])
    assert_close(found, tensor([1.5, 0, 2.25, 1]) / 4.75, rtol=0, atol=1e-6)


def test_a_priority_draw_weighs_by_the_square_of_the_advantage(batch_of):
    """Draws ∝ A⁺ of a uniform π_ref, A = 1, 2, 3: rows come 1, 2, 3 times and the loss holds A: π ∝ 1, 4, 9."""
    found = minimiser(ALoL(value=VALUE, ratio="none", clip=None), batch_of, [1, 2, 3], advantages=[1.0, 2.0, 3.0])
    assert_close(found, tensor([1, 4, 9]) / 14, rtol=0, atol=1e-8)


# --- settings


@pytest.mark.parametrize(
    ("options", "reference"),
    [({}, True), (FORMS["token"], True), (FORMS["none"], False), (FORMS["kl"], True)],
)
def test_needs_the_reference_only_where_it_reads_it(options, reference):
    assert kinds(ALoL(value=VALUE, **options)) == {Advantages} | ({ReferenceLogps} if reference else set())


RATIO = "loss.ratio is sequence, token or none; loss.clip is ε > 0, or null, as it is with ratio none"
BETA = "loss.beta is β ≥ 0, and 0 unless loss.ratio=none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "group"}, RATIO),
        ({"clip": 0.0}, RATIO),
        ({"clip": math.nan}, RATIO),
        ({"ratio": "none", "clip": 0.9}, RATIO),
        ({"beta": 0.1}, BETA),
        ({"ratio": "token", "beta": 0.1}, BETA),
        ({"ratio": "none", "clip": None, "beta": -0.1}, BETA),
        ({"ratio": "none", "clip": None, "beta": math.nan}, BETA),
        ({"draw": "some"}, "loss.draw is all, uniform or priority, got some"),
        (
            {"draw": "uniform", "clamp": False},
            "loss.clamp=false does nothing beside loss.draw=uniform, which draws A > 0 alone",
        ),
    ],
)
def test_wrong_settings_say_what_is_allowed(options, message):
    with pytest.raises(UserError) as error:
        ALoL(value=VALUE, **options)
    assert str(error.value) == message


def test_the_value_estimate_is_a_setting_of_the_loss():
    assert asdict(ALoL(value=VALUE))["value"] == asdict(VALUE)
