"""What holds for every loss of pairs."""

import pytest
import torch

from tests.losses.conftest import HALVES, LENGTHS, LOGPS, REFERENCE
from var.losses.apo import APO
from var.losses.dpo_norm import DPONorm
from var.losses.exo import EXO
from var.losses.hinge import Hinge
from var.losses.ipo import IPO
from var.losses.orpo import ORPO
from var.losses.robust import Robust
from var.losses.rpo import RPO
from var.losses.simpo import SimPO
from var.requirements import ReferenceLogps, find

LOSSES = [
    APO(beta=0.5, kind="down"), DPONorm(beta=2.0), EXO(beta=0.5, label_smoothing=0.25), Hinge(beta=0.5),
    IPO(beta=0.5, reduction="mean"), IPO(beta=0.5, reduction="sum"), ORPO(beta=0.5),
    Robust(beta=0.5, label_smoothing=0.25), RPO(beta=0.5, alpha=0.25), SimPO(beta=2.0, gamma=0.5),
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_pairs_of_a_step_add_up_over_micro_batches(batch_of, loss):
    """The divisor is the step's pairs: two micro-batches of one pair sum to the whole. DPO's has metrics beside it."""

    def value(sequences, tokens):
        stored = {"reference_logps": torch.tensor(REFERENCE[tokens])} if find(loss.requires, ReferenceLogps) else {}
        batch = batch_of(LENGTHS[sequences], global_sequences=4.0, **stored)
        return loss(torch.tensor(LOGPS[tokens]).double(), batch)[0].item()

    whole, parts = value(slice(4), slice(6)), [value(*half) for half in HALVES]
    assert sum(parts) == pytest.approx(whole, rel=1e-15, abs=0)
    assert parts[0] != parts[1]
