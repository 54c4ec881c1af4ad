"""Ensembles of rewards: by hand, from the configuration, and invalid settings."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hydra.utils import instantiate

from tests.helpers.runs import composed
from var.config.check import TRAIN, check
from var.rewards.dataset_score import Score
from var.rewards.ensemble import Ensemble
from var.rewards.programmatic import ExactNumber, NearNumber
from var.utils.errors import UserError

PROMPTS = [({"role": "user", "content": "?"},)] * 3


@dataclass(frozen=True, kw_only=True)
class Table:
    """Look up rewards in a table."""

    rewards: dict[str, float]
    scores_text = True

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"table": self.rewards}

    def __call__(self, prompts: Any, responses: Any, answers: Any) -> list[float]:
        return [self.rewards[text] for text in responses]


A, B = Table(rewards={"x": 1.0, "y": -2.0, "z": 0.0}), Table(rewards={"x": 3.0, "y": 4.0, "z": -1.0})


def score(ensemble: Ensemble) -> list[float]:
    return ensemble(PROMPTS, ["x", "y", "z"], [None] * 3)


def test_mean_and_min_by_hand():
    assert score(Ensemble(members={"a": A, "b": B})) == [2.0, 1.0, -0.5]
    assert score(Ensemble(members={"a": A, "b": B}, how="min")) == [1.0, -2.0, -1.0]


def test_member_that_returns_too_few_numbers_is_named():
    class Short(Table):
        def __call__(self, prompts: Any, responses: Any, answers: Any) -> list[float]:
            return [1.0]

    with pytest.raises(UserError, match=r"the reward \(Short\) returned 1 numbers for 3 responses"):
        score(Ensemble(members={"a": A, "b": Short(rewards={})}))


def test_every_member_checks_the_answer():
    ensemble = Ensemble(members={"a": A, "b": NearNumber()})
    assert ensemble.answer_fault("3") is None
    assert ensemble.answer_fault("x") == "its answer 'x' is not a finite number"


def test_weights_are_by_name_and_normalized():
    """(1·1 + 3·3)/4, (−2 + 12)/4, (0 − 3)/4, in another order than the members."""
    assert score(Ensemble(members={"a": A, "b": B}, weights={"b": 3, "a": 1})) == [2.5, 2.5, -0.75]


def test_members_are_scaled_before_they_are_combined():
    """σ(1) = 0.7310586 and σ(3) = 0.9525741. Their mean is not σ(2)."""
    assert score(Ensemble(members={"a": A, "b": B}, scale="sigmoid"))[0] == pytest.approx(0.84181635)
    assert score(Ensemble(members={"a": A, "b": B}, scale="sigmoid", how="min"))[0] == pytest.approx(0.7310586)


def test_fingerprint_depends_on_members_and_settings():
    ensembles = [
        Ensemble(members={"a": A, "b": B}), Ensemble(members={"a": A, "b": A}), Ensemble(members={"a": A}),
        Ensemble(members={"a": A, "b": B}, how="min"), Ensemble(members={"a": A, "b": B}, scale="sigmoid"),
        Ensemble(members={"a": A, "b": B}, weights={"a": 1, "b": 2}),
    ]  # fmt: skip
    assert len({json.dumps(ensemble.fingerprint, sort_keys=True) for ensemble in ensembles}) == len(ensembles)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"members": {}},
            "reward.members: an ensemble needs members. Add some: +reward@reward.members.NAME=",
        ),
        (
            {"members": {"a": A, "s": Score()}},
            "reward.members.s: Score reads the data set's own scores and cannot",
        ),
        ({"members": {"a": {"path": "x"}}}, "reward.members.a: not a reward, got dict. Add members: +reward@"),
        ({"members": {"a": A}, "scale": "zscore"}, "scale=raw or sigmoid, got how=mean scale=zscore"),
        ({"members": {"a": A}, "how": "max"}, "expected how=mean or min and scale=raw or sigmoid, got how=max"),
        (
            {"members": {"a": A, "b": B}, "weights": {"a": 1}},
            "weights: expected positive numbers for a, b, got a: 1",
        ),
        ({"members": {"a": A}, "weights": {"a": 0.0}}, "expected positive numbers for a, got a: 0.0"),
        ({"members": {"a": A}, "weights": {"a": 1}, "how": "min"}, "reward.weights: has no effect with reward.how=min"),
    ],
)
def test_invalid_settings_are_errors(settings, message):
    with pytest.raises(UserError) as error:
        Ensemble(**settings)
    assert message in str(error.value)


def test_members_are_composed_from_their_configurations():
    cfg = composed(
        "reward=ensemble", "+reward@reward.members.exact=exact_number", "+reward@reward.members.near=near_number",
        "reward.weights={exact: 3, near: 1}",
    )  # fmt: skip
    check(cfg, TRAIN)
    reward = instantiate(cfg.reward)
    assert reward == Ensemble(members={"exact": ExactNumber(), "near": NearNumber()}, weights={"exact": 3, "near": 1})
    assert json.loads(json.dumps(reward.fingerprint)) == reward.fingerprint
    assert reward(PROMPTS[:2], ["7", "5"], ["7", "7"]) == [1.0, 0.1875]  # (3·0 + 0.75)/4


def test_settings_of_members_are_checked():
    members = ["reward=ensemble", "+reward@reward.members.rm=classifier"]
    with pytest.raises(UserError, match=r"reward\.members\.rm\.path: must be given"):
        check(composed(*members), TRAIN)
    cfg = composed(*members, "reward.members.rm.path=someone/rm", "+reward.members.rm.max_lenght=9")
    with pytest.raises(UserError, match=r"reward\.members\.rm\.max_lenght: nothing reads this key; did you mean max_l"):
        check(cfg, TRAIN)


def test_ensemble_can_be_the_validation_reward():
    cfg = composed("+reward@eval.reward=ensemble", "+reward@eval.reward.members.a=exact_number", "eval.reward.how=min")
    check(cfg, TRAIN)
    assert instantiate(cfg.eval.reward) == Ensemble(members={"a": ExactNumber()}, how="min")
