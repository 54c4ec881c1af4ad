"""DPO and conservative DPO, by hand. The loss is log 2 if policy and reference are the same model."""

import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.losses import check_loss
from tests.helpers.models import pretrained
from var.losses.dpo import DPO
from var.models.packing import pack
from var.models.policy import Policy

VALUE = (0.3868710061 + 2.1269280110) / 2


def test_loss_matches_hand_computation(pairs):
    """β = 1/2: margins 0.75 and −2 have −log σ = 0.3868710, 2.1269280.

    A token of a better response has gradient −β σ(−margin)/2 pairs, with σ(−0.75) = 0.3208213 and σ(2) = 0.8807971.
    """
    a, b = 0.25 * 0.3208213008, 0.25 * 0.8807970780
    metrics = check_loss(DPO(beta=0.5), pairs, VALUE, [-a, -a, a, -b, b, b])
    assert metrics == pytest.approx(
        {
            "nll": 12.5 / 6, "logps/chosen": -3.0, "logps/rejected": -3.25,
            "implicit_reward/margin": (0.75 - 2) / 2, "implicit_reward/accuracy": 0.5,
        }
    )  # fmt: skip


def test_label_smoothing_is_a_mixture_of_both_labels(pairs):
    """ε = 1/4, β = 1/2: −(3/4) log σ(m) − (1/4) log σ(−m). Since log σ(−m) = log σ(m) − m, the mean gains ε · mean(m) =
    −0.15625. The gradient is −β((1 − ε) σ(−m) − ε σ(m)): 0.75 · 0.3208213 − 0.25 · 0.6791787 and
    0.75 · 0.8807971 − 0.25 · 0.1192029."""
    a, b = 0.25 * (0.75 * 0.3208213008 - 0.25 * 0.6791786992), 0.25 * (0.75 * 0.8807970780 - 0.25 * 0.1192029220)
    check_loss(DPO(beta=0.5, label_smoothing=0.25), pairs, VALUE - 0.15625, [-a, -a, a, -b, b, b])


def test_loss_of_a_model_against_itself_is_log_2(tiny_folder):
    """The policy is in training mode and the reference in evaluation mode, both loaded from one folder."""
    files = pretrained(tiny_folder, tiny_folder / "cache")
    policy, reference = Policy(files.load()).train(), Policy(files.load()).eval()
    batch = pack([[256, 5, 6, 7], [256, 5, 8, 9, 10], [256, 3, 4], [256, 3, 9]], [2, 2, 2, 2], global_sequences=4.0)
    with torch.no_grad():
        batch = replace(batch, reference_logps=reference(batch))
    loss, _ = DPO(beta=5.0)(policy(batch), batch)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
