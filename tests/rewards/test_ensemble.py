"""Rewards combined: by hand, composed as a user composes them, and what is refused."""

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
    """Rewards from a table, so that they are known by hand."""

    rewards: dict[str, float]
    scores_text = True

    @property
    def identity(self) -> dict[str, Any]:
        return {"table": self.rewards}

    def __call__(self, prompts: Any, responses: Any, answers: Any) -> list[float]:
        return [self.rewards[text] for text in responses]


A, B = Table(rewards={"x": 1.0, "y": -2.0, "z": 0.0}), Table(rewards={"x": 3.0, "y": 4.0, "z": -1.0})


def asked(ensemble: Ensemble) -> list[float]:
    return ensemble(PROMPTS, ["x", "y", "z"], [None] * 3)


def test_mean_and_min_by_hand():
    assert asked(Ensemble(members={"a": A, "b": B})) == [2.0, 1.0, -0.5]
    assert asked(Ensemble(members={"a": A, "b": B}, how="min")) == [1.0, -2.0, -1.0]


def test_a_member_that_returns_too_few_numbers_is_named():
    class Short(Table):
        def __call__(self, prompts: Any, responses: Any, answers: Any) -> list[float]:
            return [1.0]

    with pytest.raises(UserError, match=r"the reward \(Short\) returned 1 numbers for 3 responses"):
        asked(Ensemble(members={"a": A, "b": Short(rewards={})}))


def test_an_answer_is_checked_by_every_member():
    ensemble = Ensemble(members={"a": A, "b": NearNumber()})
    assert ensemble.answer_fault("3") is None
    assert ensemble.answer_fault("x") == "its answer 'x' is no finite number"


def test_weights_are_of_the_mean_by_name_and_sum_to_one():
    """(1·1 + 3·3)/4, (−2 + 12)/4, (0 − 3)/4; named in another order than the members."""
    assert asked(Ensemble(members={"a": A, "b": B}, weights={"b": 3, "a": 1})) == [2.5, 2.5, -0.75]


def test_members_are_scaled_before_they_are_combined():
    """σ(1) = 0.7310586, σ(3) = 0.9525741; their mean is not σ of the mean 2."""
    assert asked(Ensemble(members={"a": A, "b": B}, scale="sigmoid"))[0] == pytest.approx(0.84181635)
    assert asked(Ensemble(members={"a": A, "b": B}, scale="sigmoid", how="min"))[0] == pytest.approx(0.7310586)


def test_the_identity_holds_all_that_the_numbers_depend_on():
    ensembles = [
        Ensemble(members={"a": A, "b": B}), Ensemble(members={"a": A, "b": A}), Ensemble(members={"a": A}),
        Ensemble(members={"a": A, "b": B}, how="min"), Ensemble(members={"a": A, "b": B}, scale="sigmoid"),
        Ensemble(members={"a": A, "b": B}, weights={"a": 1, "b": 2}),
    ]  # fmt: skip
    assert len({json.dumps(ensemble.identity, sort_keys=True) for ensemble in ensembles}) == len(ensembles)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"members": {}}, "reward=ensemble has no members; add some: +reward@reward.members.a=classifier"),
        ({"members": {"a": A, "s": Score()}}, "reward.members.s (Score) reads scores of the data and cannot score"),
        ({"members": {"a": {"path": "x"}}}, "reward.members.a is no reward but {'path': 'x'}; a member is added so"),
        ({"members": {"a": A}, "scale": "zscore"}, "reward.scale raw or sigmoid, got mean, zscore"),
        ({"members": {"a": A}, "how": "max"}, "reward.how is mean or min and reward.scale raw or sigmoid, got max"),
        ({"members": {"a": A, "b": B}, "weights": {"a": 1}}, "for each of a, b, got {'a': 1}"),
        ({"members": {"a": A}, "weights": {"a": 0.0}}, "is a number above 0 for each of a, got {'a': 0.0}"),
        ({"members": {"a": A}, "weights": {"a": 1}, "how": "min"}, "beside reward.how=min they do nothing"),
    ],
)
def test_what_cannot_be_combined_is_refused(settings, told):
    with pytest.raises(UserError) as error:
        Ensemble(**settings)
    assert told in str(error.value)


def test_members_are_composed_from_their_own_group_files():
    cfg = composed(
        "reward=ensemble", "+reward@reward.members.exact=exact_number", "+reward@reward.members.near=near_number",
        "reward.weights={exact: 3, near: 1}",
    )  # fmt: skip
    check(cfg, TRAIN)
    reward = instantiate(cfg.reward)
    assert reward == Ensemble(members={"exact": ExactNumber(), "near": NearNumber()}, weights={"exact": 3, "near": 1})
    assert json.loads(json.dumps(reward.identity)) == reward.identity
    assert reward(PROMPTS[:2], ["7", "5"], ["7", "7"]) == [1.0, 0.1875]  # (3·0 + 0.75)/4


def test_a_members_settings_are_checked_and_reached_as_any_others():
    members = ["reward=ensemble", "+reward@reward.members.rm=classifier"]
    with pytest.raises(UserError, match=r"reward\.members\.rm\.path: must be given"):
        check(composed(*members), TRAIN)
    cfg = composed(*members, "reward.members.rm.path=someone/rm", "+reward.members.rm.max_lenght=9")
    with pytest.raises(UserError, match=r"reward\.members\.rm\.max_lenght: nothing reads this key; did you mean max_l"):
        check(cfg, TRAIN)


def test_an_ensemble_judges_validation_too():
    cfg = composed("+reward@eval.reward=ensemble", "+reward@eval.reward.members.a=exact_number", "eval.reward.how=min")
    check(cfg, TRAIN)
    assert instantiate(cfg.eval.reward) == Ensemble(members={"a": ExactNumber()}, how="min")
