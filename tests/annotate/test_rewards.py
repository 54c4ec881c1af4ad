"""Rewards of responses to their own prompts and to others, and what a wrong reward raises."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.annotators import ROWS, Lengths, RowSource, make_sequences
from var.annotate.rewards import ProvideRewards, cross_rewards, score, score_rows
from var.data.read import read
from var.data.report import DataReport
from var.data.row import Response, Row
from var.requirements import Rewards
from var.rewards.base import check_answers
from var.rewards.dataset_score import Score
from var.rewards.ensemble import Ensemble
from var.rewards.programmatic import ExactNumber, NearNumber
from var.rewards.scale import Scale
from var.utils.errors import UserError


def test_any_pairing_of_prompt_response_and_answer_is_scored(make):
    annotator = make()
    rows, _ = make_sequences(annotator)
    found = score_rows(annotator, rows)
    assert found.tolist() == [len(r.text) + 100.0 for row in ROWS for r in row.responses]
    prompt = ROWS[0].prompt
    triples = [(prompt, "it is 0", "0"), (prompt, "it", "0"), (prompt, "it is 0", None)]
    assert score(annotator, triples).tolist() == [107, 2, 7]


NAMES = ("add", "multiply")


def test_tool_calls_are_scored_as_json(make):
    """Responses that differ only in their calls have different texts, and so different entries in the cache."""
    annotator = make()
    calls = [{"tool_calls": [{"function": {"name": name}}]} for name in NAMES]
    responses = tuple(Response(text="", message=message) for message in calls)
    rows = read(RowSource((Row(id="r", prompt=ROWS[0].prompt, responses=responses),)), annotator.cache)
    assert score_rows(annotator, rows).tolist() == [len(f'{{"function": {{"name": "{name}"}}}}') for name in NAMES]
    assert responses[0].as_text == '{"function": {"name": "add"}}'


def test_cross_rewards_score_response_j_with_prompt_and_answer_i(make, tmp_path):
    """With exact numbers, a response is right only under prompts that have its answer."""
    annotator = make()
    rows, sequences = make_sequences(annotator)
    micro = np.array([[1, 3], [0, -1]])
    found = cross_rewards(annotator, rows, sequences, micro)
    texts = [rows[row].responses[k].text for row, k in zip(sequences.row, sequences.response, strict=True)]
    a, b = texts[1], texts[3]
    assert (sequences.row[1], sequences.row[3]) == (0, 2)
    assert found.tolist() == [[[len(a) + 100, len(b)], [len(a), len(b) + 100]], [[len(texts[0]) + 100, 0], [0, 0]]]
    assert set(annotator.reward.asked) == {
        ("what is ?", a, "0"), ("what is ?", b, "0"), ("what is ???", a, "2"), ("what is ???", b, "2"),
        ("what is ?", texts[0], "0"),
    }  # fmt: skip
    exact = cross_rewards(make(ExactNumber()), rows, sequences, micro[:1])
    assert exact[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_nonfinite_reward_is_an_error_and_is_not_cached(make, tmp_path):
    annotator = make(Lengths(nan_for="it is 2!"))
    rows, _ = make_sequences(annotator)
    with pytest.raises(UserError) as error:
        score_rows(annotator, rows)
    assert str(error.value) == "rewards that are not finite (1):\n  response 'it is 2!': the reward is NaN or infinite"
    assert not list((tmp_path / "store").rglob("*.arrow"))


class Returns:
    """A user's reward, which returns a given object."""

    scores_text = True
    fingerprint = {"program": "returns"}  # noqa: RUF012

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def __call__(self, prompts: Any, responses: Any, answers: Any) -> Any:
        return self.returned


TRIPLES = [(ROWS[0].prompt, text, None) for text in "abc"]


@pytest.mark.parametrize(
    "returned",
    [
        [0, 1, 1], [False, True, True], [np.bool_(0), np.bool_(1), np.bool_(1)], [np.float32(0), 1, "1"],
        np.array([[0], [1], [1]]), torch.tensor([0.0, 1.0, 1.0]), torch.tensor([[0], [1], [1]]),
        [torch.tensor(0.0), torch.tensor(1.0), torch.tensor([1.0])[0]],
    ],
)  # fmt: skip
def test_reward_can_return_a_list_an_array_or_a_tensor(make, returned):
    found = score(make(Returns(returned)), TRIPLES)
    assert (found.tolist(), found.dtype) == ([0.0, 1.0, 1.0], np.float64)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "the reward (Returns) returned 2 numbers for 3 responses; expected one each"),
        (np.ones((3, 2)), "the reward (Returns) returned 6 numbers for 3 responses; expected one each"),
        (None, "the reward (Returns) returned 1 numbers for 3 responses; expected one each"),
        (["a", "b", "c"], "the reward (Returns) must return a list of numbers: could not convert string to float: 'a'"),
        ([{}, {}, {}], "the reward (Returns) must return a list of numbers: float() argument must be a string or a "
                       "real number, not 'dict'"),
        (torch.ones(3, requires_grad=True), "the reward (Returns) must return a list of numbers: Can't call numpy() on "
                                            "Tensor that requires grad. Use tensor.detach().numpy() instead."),
        ([1.0, None, 2.0], "rewards that are not finite (1):\n  response 'b': the reward is NaN or infinite"),
    ],
)  # fmt: skip
def test_reward_that_returns_something_else_is_an_error(make, returned, message):
    with pytest.raises(UserError) as error:
        score(make(Returns(returned)), TRIPLES)
    assert str(error.value) == message


def test_error_of_a_reward_names_it_and_the_first_response(make):
    class Raises(Returns):
        def __call__(self, prompts: Any, responses: Any, answers: Any) -> Any:
            return 1 / 0

    with pytest.raises(ZeroDivisionError) as error:
        score(make(Raises(None)), TRIPLES)
    assert error.value.__notes__ == ["It comes from the reward (Raises), for 3 responses, the first of which is 'a'."]


@pytest.mark.parametrize(
    "reward", [ExactNumber(), NearNumber(), Ensemble(members={"a": Lengths(), "b": ExactNumber()})]
)
def test_all_unusable_answers_are_listed(make, reward):
    answers = ["1,000", None, "12 apples", "nan", "1e400", "-2.5"]
    rows, _ = make_sequences(make(), tuple(replace(row, answer=a) for row, a in zip(ROWS, answers, strict=True)))
    with pytest.raises(UserError) as error:
        check_answers(reward, rows)
    assert str(error.value).splitlines()[:-1] == [
        "the reward compares with a row's `answer`, which is missing or unusable (3):",
        "  row row-1: no answer",
        "  row row-3: its answer 'nan' is not a finite number",
        "  row row-4: its answer '1e400' is not a finite number",
    ]
    check_answers(Lengths(), rows)


def test_scores_of_the_data_are_read_and_all_missing_ones_listed(make):
    annotator = make(Score())
    rows, _ = make_sequences(annotator)
    assert score_rows(annotator, rows).tolist() == [r.score for row in ROWS for r in row.responses]
    unscored = tuple(
        replace(row, responses=tuple(replace(r, score=None) for r in row.responses)) if i in (1, 4) else row
        for i, row in enumerate(ROWS)
    )
    with pytest.raises(UserError) as error:
        score_rows(annotator, make_sequences(annotator, unscored)[0])
    assert str(error.value) == (
        "reward=score, but rows have no score (2):\n"
        "  row row-1: a response has no score\n"
        "  row row-4: a response has no score\n"
        "If another column has the scores, name it: data.columns='{score: <column>}'. Otherwise choose a reward that "
        "scores text, such as reward=offsetbias-rm-8b."
    )


@pytest.mark.parametrize("responses", ["sampled", "auto"])
def test_scores_of_sampled_responses_are_an_error_before_they_are_sampled(responses, make):
    rows = make_sequences(annotator := make(Score()))[0]
    if responses == "auto":
        rows = replace(rows, facts=np.zeros_like(rows.facts))  # rows without responses
    data: Any = SimpleNamespace(annotator=annotator, settings=SimpleNamespace(responses=responses))
    with pytest.raises(UserError, match=r"the responses that train are sampled, without scores"):
        ProvideRewards(Rewards()).check_rows(data, rows)
    data.settings.responses = "auto"
    ProvideRewards(Rewards()).check_rows(data, make_sequences(annotator)[0])


def test_scores_that_a_reward_does_not_use_are_counted(make, capsys):
    annotator = make(Lengths())
    rows, sequences = make_sequences(annotator)
    data: Any = SimpleNamespace(
        annotator=annotator, rows=rows, sequences=sequences, scale=Scale(), report=DataReport(), unit="response"
    )
    ProvideRewards(Rewards()).select(data)
    expected = "8 of 8 responses have a score in the data, which this reward does not use. reward=score does."
    assert expected in " ".join(capsys.readouterr().out.split())


def test_mismatch_gap_lowers_a_score_under_another_prompt(make):
    """Sequences 0 and 1 answer one prompt: scores 0 and 0.5, no gap between them. Sequence 2 has score 1."""
    annotator = make(Score(mismatch_gap=2.0))
    rows, sequences = make_sequences(annotator)
    found = cross_rewards(annotator, rows, sequences, np.array([[0, 1, 2, -1]]))
    assert found[0].tolist() == [[0, 0.5, -1, 0], [0, 0.5, -1, 0], [-2, -1.5, 1, 0], [0, 0, 0, 0]]


def test_scores_without_a_gap_cannot_serve_an_in_batch_estimator(make):
    annotator = make(Score())
    rows, sequences = make_sequences(annotator)
    with pytest.raises(UserError) as error:
        cross_rewards(annotator, rows, sequences, np.array([[0, 1]]))
    assert str(error.value) == (
        "reward=score has only the rewards of responses to their own prompts, and an in-batch estimator needs every "
        "response of a micro-batch under every prompt of it. Choose a reward that scores text, or loss=var_prompt, "
        "which needs no other rewards, or set reward.mismatch_gap to the reward that a response loses under another "
        "prompt."
    )


def test_negative_rewards_that_would_be_weights_are_an_error(make):
    """π_θ(y|x) → 0 would be a loss of −∞. A loss does not check them itself: it would wait for the device."""
    annotator = make()
    rows, sequences = make_sequences(annotator)
    data: Any = SimpleNamespace(annotator=annotator, rows=rows, sequences=sequences, scale=Scale(kind="zscore"))
    with pytest.raises(UserError, match=r"this loss uses rewards as weights, and \d of \d are negative, the lowest -"):
        ProvideRewards(Rewards(nonnegative=True)).select(data)
