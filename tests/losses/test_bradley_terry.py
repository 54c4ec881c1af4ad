"""Bradley-Terry reward model: the likelihood of a pair's order, the margin and the centering, by hand."""

import pytest

from tests.helpers.losses import check_loss, make_batch
from var.losses.bradley_terry import BradleyTerry
from var.requirements import Pairs, Rewards, SequenceScores
from var.utils.errors import UserError

SCORES = [1.0, 0.25, -0.5, 1.5]


@pytest.mark.parametrize(
    ("options", "value", "gradient"),
    [
        # The gaps 0.75 and −2 have −log σ = 0.3868710, 2.1269280, and slopes −σ(−gap) = −0.3208213, −0.8807971.
        ({}, 2.5137990171, [-0.3208213008, 0.3208213008, -0.8807970780, 0.8807970780]),
        # Rewards differ by 1 and 3.5, so the gaps minus 1/2 of that are 0.25 and −3.75: −log σ = 0.5759394, 3.7732455.
        ({"margin": 0.5}, 4.3491848843, [-0.4378234991, 0.4378234991, -0.9770226301, 0.9770226301]),
        # k (s_w + s_l)², with sums 1.25 and 1: 0.1 · 2.5625 and slopes 0.25, 0.2.
        ({"centering": 0.1}, 2.7700490171, [-0.0708213008, 0.5708213008, -0.6807970780, 1.0807970780]),
    ],
    ids=["plain", "margin", "centering"],
)
def test_loss_matches_hand_computation(options, value, gradient):
    batch = make_batch([2, 1, 1, 2], rewards=[2.0, 1.0, 3.0, -0.5])
    slopes = [slope / 2 for slope in gradient]
    metrics = check_loss(BradleyTerry(**options), batch, value / 2, slopes, SCORES, rtol=1e-8)
    assert metrics == pytest.approx({"score/margin": -0.625, "score/accuracy": 0.5, "score/mean": 0.5625})


def test_rewards_are_required_only_with_a_margin():
    assert BradleyTerry().requires == (Pairs(), SequenceScores())
    assert BradleyTerry(margin=0.5).requires == (Pairs(), SequenceScores(), Rewards())


@pytest.mark.parametrize("options", [{"margin": -0.1}, {"centering": -0.1}])
def test_invalid_settings_are_errors(options):
    with pytest.raises(UserError, match=r"^loss\.margin and loss\.centering must be at least 0$"):
        BradleyTerry(**options)
