"""Rewards that are programs, the data's own score, and the scale of a run."""

import math
import sys

import numpy as np
import pytest

from var.rewards.dataset_score import Score
from var.rewards.programmatic import ExactNumber, NearNumber, Sentiment
from var.rewards.scale import Scale
from var.utils.errors import UserError

PROMPT = ({"role": "user", "content": "?"},)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is 42.", "42", 1.0),
        ("42", "43", 0.0),
        ("6 times 7 is 42", "42", 1.0),
        ("It is 42, not 41", "42", 0.0),  # the last number counts
        ("It is -5.", "-5", 1.0),
        ("It is -5.", "5", 0.0),
        ("1,234.", "1234", 1.0),
        ("1,234,567", "1234567", 1.0),
        ("1,234", "1,234", 1.0),  # the data's answer may have them too
        ("It costs $5.", "5", 1.0),
        ("$1,234.50", "1234.5", 1.0),
        ("3.0", "3", 1.0),
        ("3.14", "3", 0.0),
        ("007", "7", 1.0),
        ("12, ", "12", 1.0),
        ("12%", "12", 1.0),
        ("forty-two", "42", 0.0),
        ("", "0", 0.0),
        ("no number", "0", 0.0),
        ("**42**", " 42 ", 1.0),
    ],
)
def test_exact_number(text, answer, expected):
    assert ExactNumber()([PROMPT], [text], [answer]) == [expected]


def test_exact_number_of_many_keeps_the_order():
    assert ExactNumber()([PROMPT] * 3, ["1", "2", "3"], ["1", "1", "3"]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("7", "7", 1.0),
        ("it is 5", "7", 0.75),
        ("9 or 8", "7", 0.875),
        ("-3", "0", 0.0),
        ("none", "0", 0.0),
        ("99", "7", 0),
    ],
)
def test_near_number_falls_with_the_distance_over_one_plus_the_answer(text, answer, expected):
    assert NearNumber()([PROMPT], [text], [answer]) == [expected]


def test_a_row_without_an_answer_is_an_error():
    with pytest.raises(UserError) as error:
        ExactNumber()([PROMPT] * 2, ["1", "2"], ["1", None])
    assert str(error.value) == "this reward compares with a row's `answer`; these rows have none"


def test_an_answer_that_is_no_number_is_an_error_that_names_it():
    with pytest.raises(UserError) as error:
        ExactNumber()([PROMPT] * 3, ["1", "2", "3"], ["1", "yes", "#### 3"])
    assert str(error.value) == "this reward compares with a number, and a row's `answer` is 'yes'"


@pytest.mark.parametrize("answer", ["nan", "inf", "-inf", "1e400"])
def test_an_answer_that_is_no_finite_number_is_an_error(answer):
    for reward in (ExactNumber(), NearNumber()):
        with pytest.raises(UserError, match=f"compares with a number, and a row's `answer` is '{answer}'"):
            reward([PROMPT], ["1"], [answer])
        assert reward.answer_fault(answer) == f"its answer '{answer}' is no finite number"
        assert reward.answer_fault("1,234") is None


def test_sentiment_is_the_compound_score():
    pytest.importorskip("vaderSentiment")
    good, bad, none = Sentiment()(
        [PROMPT] * 3, ["This is great, I love it!", "Horrible and sad.", "A table."], [None] * 3
    )
    assert -1 <= bad < -0.5
    assert 0.5 < good <= 1
    assert none == 0.0


def test_sentiment_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    for ask in (lambda: Sentiment()([PROMPT], ["x"], [None]), lambda: Sentiment().identity):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value) == "reward=sentiment needs an extra: pip install -e '.[sentiment]'"


def test_programs_have_identities_of_their_own():
    pytest.importorskip("vaderSentiment")
    identities = [ExactNumber().identity, Sentiment().identity, Score().identity]
    assert all(identities[i] != identities[j] for i in range(3) for j in range(i))


def test_score_cannot_score_text():
    assert not Score().scores_text
    with pytest.raises(UserError) as error:
        Score()([PROMPT], ["x"], [None])
    assert str(error.value) == (
        "reward=score reads the scores that the data carries and cannot score other text; choose a reward that can"
    )


# --- the scale


def test_raw_is_as_it_is():
    rewards = np.array([-3.0, 0.5, 1e9])
    scale = Scale().fitted(rewards)
    assert scale(rewards).tolist() == rewards.tolist()
    assert scale.describe() == "raw"


def test_sigmoid():
    """1/(1 + e^−r) at 0, log 3, −log 3: 1/2, 3/4, 1/4; far out it is 0 or 1, without a warning."""
    scale = Scale(kind="sigmoid").fitted(np.array([0.0, 1.0]))
    assert scale(np.array([0.0, math.log(3), -math.log(3)])) == pytest.approx([0.5, 0.75, 0.25])
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        assert scale(np.array([-1e4, 1e4])).tolist() == [0.0, 1.0]
    assert scale.describe() == "sigmoid"


def test_zscore_keeps_the_moments_of_the_training_responses():
    """1, 3, 5, 7: mean 4, sd √5. Later rewards are measured by these moments, not by their own."""
    scale = Scale(kind="zscore").fitted(np.array([1.0, 3.0, 5.0, 7.0]))
    assert (scale.mean, scale.sd) == (4.0, pytest.approx(math.sqrt(5)))
    assert scale(np.array([4.0, 4 + 2 * math.sqrt(5)])) == pytest.approx([0.0, 2.0])
    assert scale.describe() == "zscore(mean=4, sd=2.236)"


def test_zscore_of_equal_rewards_is_an_error():
    with pytest.raises(UserError) as error:
        Scale(kind="zscore").fitted(np.full(3, 0.1))
    assert str(error.value) == "reward_scale=zscore, but every reward is the same"


def test_another_scale_is_refused():
    with pytest.raises(UserError) as error:
        Scale(kind="minmax")
    assert str(error.value) == "reward_scale is raw, sigmoid or zscore, got minmax"
