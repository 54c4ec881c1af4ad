"""Programmatic rewards, the data set's own score, and the reward scale."""

import math
import sys

import numpy as np
import pytest

from var.rewards.dataset_score import Score
from var.rewards.programmatic import ExactNumber, NearNumber, Sentiment
from var.rewards.scale import Scale
from var.utils.errors import UserError

PROMPT = ({"role": "user", "content": "?"},)


RIGHT = [
    ("The answer is 42.", "42"), ("6 times 7 is 42", "42"), ("It is -5.", "-5"), ("1,234.", "1234"),
    ("1,234,567", "1234567"), ("1,234", "1,234"), ("It costs $5.", "5"), ("$1,234.50", "1234.5"), ("3.0", "3"),
    ("007", "7"), ("12, ", "12"), ("12%", "12"), ("**42**", " 42 "),
]  # fmt: skip
WRONG = [
    ("42", "43"), ("It is 42, not 41", "42"), ("It is -5.", "5"), ("3.14", "3"), ("forty-two", "42"), ("", "0"),
    ("no number", "0"),
]  # fmt: skip


def test_exact_number_compares_the_last_number():
    texts, answers = zip(*RIGHT, *WRONG, strict=True)
    assert ExactNumber()([PROMPT] * len(texts), texts, answers) == [1.0] * len(RIGHT) + [0.0] * len(WRONG)


def test_near_number_decreases_with_relative_distance():
    texts, answers = ["7", "it is 5", "not 9 but 8", "-3", "none", "99"], ["7", "7", "7", "0", "0", "7"]
    assert NearNumber()([PROMPT] * 6, texts, answers) == [1.0, 0.75, 0.875, 0.0, 0.0, 0.0]


def test_row_without_an_answer_is_an_error():
    with pytest.raises(UserError, match=r"^this reward compares with a row's `answer`, but these rows have none$"):
        ExactNumber()([PROMPT] * 2, ["1", "2"], ["1", None])


@pytest.mark.parametrize("answer", ["nan", "inf", "-inf", "1e400", "yes"])
def test_answer_that_is_not_a_finite_number_is_an_error(answer):
    for reward in (ExactNumber(), NearNumber()):
        with pytest.raises(UserError, match=f"compares with a number, but a row's `answer` is '{answer}'"):
            reward([PROMPT] * 3, ["1", "2", "3"], ["1", answer, "#### 3"])
        assert reward.answer_fault(answer) == f"its answer '{answer}' is not a finite number"
        assert reward.answer_fault("1,234") is None


def test_sentiment_is_the_compound_score():
    pytest.importorskip("vaderSentiment")
    good, bad, none = Sentiment()(
        [PROMPT] * 3, ["This is great, I love it!", "Horrible and sad.", "A table."], [None] * 3
    )
    assert -1 <= bad < -0.5
    assert 0.5 < good <= 1
    assert none == 0.0


def test_sentiment_without_its_package_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    for ask in (lambda: Sentiment()([PROMPT], ["x"], [None]), lambda: Sentiment().fingerprint):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value) == "reward=sentiment needs an extra: pip install -e '.[sentiment]'"


def test_identities_of_programs_differ():
    pytest.importorskip("vaderSentiment")
    fingerprints = [ExactNumber().fingerprint, Sentiment().fingerprint, Score().fingerprint]
    assert all(fingerprints[i] != fingerprints[j] for i in range(3) for j in range(i))


def test_score_cannot_score_text():
    assert not Score().scores_text
    with pytest.raises(UserError, match=r"^reward=score reads the data set's own scores and cannot score other text"):
        Score()([PROMPT], ["x"], [None])


# --- the scale


def test_raw_scale_changes_nothing():
    rewards = np.array([-3.0, 0.5, 1e9])
    scale = Scale().fit(rewards)
    assert scale(rewards).tolist() == rewards.tolist()
    assert scale.describe() == "raw"


def test_sigmoid_scale():
    """1/(1 + e^−r) at 0, log 3, −log 3 is 1/2, 3/4, 1/4. Large rewards give 0 or 1 without a warning."""
    scale = Scale(kind="sigmoid").fit(np.array([0.0, 1.0]))
    assert scale(np.array([0.0, math.log(3), -math.log(3)])) == pytest.approx([0.5, 0.75, 0.25])
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        assert scale(np.array([-1e4, 1e4])).tolist() == [0.0, 1.0]
    assert scale.describe() == "sigmoid"


def test_zscore_scale_keeps_the_moments_of_the_training_rewards():
    """1, 3, 5, 7 have mean 4 and sd √5. Later rewards are scaled with these moments."""
    scale = Scale(kind="zscore").fit(np.array([1.0, 3.0, 5.0, 7.0]))
    assert (scale.mean, scale.sd) == (4.0, pytest.approx(math.sqrt(5)))
    assert scale(np.array([4.0, 4 + 2 * math.sqrt(5)])) == pytest.approx([0.0, 2.0])
    assert scale.describe() == "zscore(mean=4, sd=2.236)"


def test_unknown_scale_and_zscore_of_equal_rewards_are_errors():
    with pytest.raises(UserError, match=r"^reward_scale=zscore: all rewards are equal"):
        Scale(kind="zscore").fit(np.full(3, 0.1))
    with pytest.raises(UserError, match=r"^reward_scale: expected raw, sigmoid or zscore, got minmax$"):
        Scale(kind="minmax")
