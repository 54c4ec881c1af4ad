"""VAR: the SFT step with its weights. tests/weights has the weights themselves."""

import pytest

from tests.helpers.losses import check_loss, make_batch
from tests.helpers.weights import make_inputs, weigh
from var.losses.var import VAR
from var.requirements import Rewards, Weights
from var.weights.estimators import Global, Grouped, InBatch, Prompt, Value


@pytest.mark.parametrize(("normalize", "divisor"), [("token", 12), ("sequence", 8)])
def test_loss_matches_hand_computation(normalize, divisor):
    """A pair, Δr = 1, λ = 1/2: w = 1.7615942, 0.2384058. Σ w·nll = 2.5 w₁ + 9 w₂ = 6.5496380, over 12 tokens or 8
    sequences."""
    loss = VAR(
        estimator=Grouped(drop_zero_variance=False), temperature=0.5, normalize=normalize, temperature_unit="reward"
    )
    weights = weigh(loss.estimator, make_inputs([1.0, 0.0], group=[0, 0]), loss.temperature)
    batch = make_batch([2, 1], weights=weights, global_tokens=12.0, global_sequences=8.0)
    gradient = [-weight / divisor for weight in (1.7615941559557646, 1.7615941559557646, 0.2384058440442354)]
    check_loss(loss, batch, 6.549637986 / divisor, gradient, [-0.5, -2.0, -9.0])


@pytest.mark.parametrize(
    ("estimator", "reads_reference"),
    [
        (InBatch(), True), (InBatch(reference="own"), True), (InBatch(reduction="none"), False),
        (Grouped(drop_zero_variance=False), False),
        (Prompt(), False), (Value(), False), (Global(), False),
    ],
)  # fmt: skip
def test_required_weights_carry_the_settings(estimator, reads_reference):
    settings = {"estimator": estimator, "temperature": 0.3, "temperature_unit": "sd", "min_weight": 0.0}
    assert VAR(**settings).requires == (Rewards(), Weights(**settings))
    assert Weights(**settings).reads_reference == reads_reference
