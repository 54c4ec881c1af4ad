"""VAR: the SFT step with its weights. tests/weights has the weights themselves."""

import pytest
import torch

from tests.helpers.losses import check_loss, double, make_batch
from var.losses.var import VAR
from var.requirements import Rewards, Weights, find
from var.weights.estimators import Global, Grouped, InBatch, Prompt, Value, compute_weights
from var.weights.inputs import WeightInputs


def test_loss_matches_hand_computation():
    """A pair, Δr = 1, λ = 1/2: w = 1.7615942, 0.2384058. Σ w·nll = 2.5 w₁ + 9 w₂ = 6.5496380, over 12 tokens."""
    loss = VAR(estimator=Grouped(), temperature=0.5)
    inputs = WeightInputs(rewards=double([1.0, 0.0]), group=torch.tensor([0, 0]), length=torch.tensor([2, 1]))
    batch = make_batch([2, 1], weights=compute_weights(find(loss.requires, Weights), inputs), global_tokens=12.0)
    gradient = [-weight / 12 for weight in (1.7615941559557646, 1.7615941559557646, 0.2384058440442354)]
    check_loss(loss, batch, 6.549637986 / 12, gradient, [-0.5, -2.0, -9.0])


def test_sequence_normalization_divides_by_sequences():
    batch = make_batch([1, 1], weights=[1.0, 1.0], global_sequences=8.0)
    check_loss(VAR(estimator=Global(), normalize="sequence"), batch, 0.5, [-1 / 8, -1 / 8], [-1.0, -3.0])


@pytest.mark.parametrize(
    ("estimator", "reads_reference"),
    [
        (InBatch(), True), (InBatch(reference="own"), True), (InBatch(reduction="none"), False), (Grouped(), False),
        (Prompt(), False), (Value(), False), (Global(), False),
    ],
)  # fmt: skip
def test_required_weights_carry_the_settings(estimator, reads_reference):
    settings = {"estimator": estimator, "temperature": 0.3, "temperature_unit": "sd", "min_weight": 0.0}
    assert VAR(**settings).requires == (Rewards(), Weights(**settings))
    assert Weights(**settings).reads_reference == reads_reference
