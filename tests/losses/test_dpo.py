"""DPO and conservative DPO: values and gradients by hand; log 2 where policy and reference are one model."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.models import pretrained
from tests.losses.conftest import HALVES, LENGTHS, LOGPS, REFERENCE, kinds, loss_and_gradient
from var.losses.dpo import DPO
from var.models.packing import pack
from var.models.policy import Policy
from var.requirements import Pairs, ReferenceLogps
from var.utils.errors import UserError


def test_loss_and_gradient_by_hand(pairs):
    """β = 1/2: margins 0.75, −2. −log σ: 0.3868710, 2.1269280; their mean 1.2568995.

    ∂/∂logp of a better response's token: −β σ(−margin)/2 pairs: σ(−0.75) = 0.3208213, σ(2) = 0.8807971.
    """
    value, gradient, metrics = loss_and_gradient(DPO(beta=0.5), pairs)
    assert value == pytest.approx((0.3868710061 + 2.1269280110) / 2, rel=1e-9)
    a, b = 0.25 * 0.3208213008, 0.25 * 0.8807970780
    assert_close(gradient, torch.tensor([-a, -a, a, -b, b, b], dtype=torch.float64), rtol=1e-9, atol=0)
    assert metrics == pytest.approx(
        {
            "nll": 12.5 / 6, "logps/chosen": -3.0, "logps/rejected": -3.25,
            "implicit_reward/margin": (0.75 - 2) / 2, "implicit_reward/accuracy": 0.5,
        }
    )  # fmt: skip


def test_label_smoothing_is_the_mixture_of_both_labels(pairs):
    """ε = 1/4, β = 1/2: −(3/4) log σ(m) − (1/4) log σ(−m), log σ(−m) = log σ(m) − m: the mean gains ε · mean(m) =
    −0.15625. Gradient −β((1 − ε) σ(−m) − ε σ(m)): 0.75 · 0.3208213 − 0.25 · 0.6791787; 0.75 · 0.8807971 − 0.25 ·
    0.1192029."""
    value, gradient, _ = loss_and_gradient(DPO(beta=0.5, label_smoothing=0.25), pairs)
    plain, _, _ = loss_and_gradient(DPO(beta=0.5), pairs)
    assert value == pytest.approx(plain + 0.25 * (0.75 - 2) / 2, rel=1e-12)
    a, b = 0.25 * (0.75 * 0.3208213008 - 0.25 * 0.6791786992), 0.25 * (0.75 * 0.8807970780 - 0.25 * 0.1192029220)
    assert_close(gradient, torch.tensor([-a, -a, a, -b, b, b], dtype=torch.float64), rtol=1e-9, atol=0)


def test_pairs_of_a_step_add_up_over_micro_batches(batch_of, pairs):
    """The divisor is the step's pairs: two micro-batches of one pair sum to the whole."""
    whole, _, _ = loss_and_gradient(DPO(beta=0.5), pairs)
    parts = []
    for sequences, tokens in HALVES:
        batch = batch_of(LENGTHS[sequences], reference_logps=torch.tensor(REFERENCE[tokens]), global_sequences=4.0)
        part, metrics = DPO(beta=0.5)(torch.tensor(LOGPS[tokens]).double(), batch)
        assert metrics["implicit_reward/accuracy"] == (float(sequences.start == 0), 1.0)  # margins 0.75, −2
        parts.append(part.item())
    assert sum(parts) == pytest.approx(whole, rel=1e-15)


def test_a_large_margin_neither_overflows_nor_loses_its_gradient(batch_of):
    """log σ(−1e4) is −1e4, not −∞; the gradient there is −β a pair."""
    logps = torch.tensor([-1e4, 0.0], requires_grad=True)
    loss, _ = DPO(beta=1.0)(logps, batch_of([1, 1], reference_logps=torch.zeros(2)))
    loss.backward()
    assert loss.item() == 1e4
    assert_close(logps.grad, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_step_0_is_log_2(batch_of, smoothing):
    """Policy = reference: the margin is exactly 0, and the loss log 2 whatever β and the smoothing."""
    torch.manual_seed(0)
    logps = -torch.rand(9)
    batch = batch_of([2, 3, 3, 1], reference_logps=logps.clone())
    loss, _ = DPO(beta=0.37, label_smoothing=smoothing)(logps, batch)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-7)


def test_step_0_is_log_2_with_a_model(tiny_folder):
    """The same through a real forward: a policy in training mode beside a reference in evaluation mode, one folder."""
    files = pretrained(tiny_folder, tiny_folder / "cache")
    policy, reference = Policy(files.load()).train(), Policy(files.load()).eval()
    batch = pack([[256, 5, 6, 7], [256, 5, 8, 9, 10], [256, 3, 4], [256, 3, 9]], [2, 2, 2, 2], global_sequences=4.0)
    with torch.no_grad():
        batch = replace(batch, reference_logps=reference(batch))
    loss, _ = DPO(beta=5.0)(policy(batch), batch)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_needs_pairs_and_the_reference():
    assert kinds(DPO()) == {Pairs, ReferenceLogps}


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": math.nan}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}]
)
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        DPO(**options)
    assert str(error.value) == "loss.beta is β > 0 and loss.label_smoothing lies in [0, 0.5)"
