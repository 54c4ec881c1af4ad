"""Rewards and lengths of answers, and their divergence from the reference."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tests.helpers.models import pretrained
from tests.helpers.packing import unpack_sequences
from tests.helpers.runs import write_lines
from var.data.chat import Chat
from var.data.read import read
from var.data.rows import Rows
from var.data.sources.files import Files
from var.evaluate.answers import compute_logps, divergence, pack_answers, samples, score_answers, win_rate
from var.models.attention import use_attention
from var.models.policy import Policy
from var.rewards.dataset_score import Score
from var.rewards.programmatic import ExactNumber
from var.rewards.scale import Scale
from var.sampling.base import Sample
from var.utils.errors import UserError

TEXTS = [[Sample("3", True), Sample("it is 44", False)], [Sample("", True), Sample("4.", True)]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("rows")
    records = [{"prompt": "1 + 2", "answer": "3"}, {"prompt": "2 + 2", "answer": "4"}]
    return read(Files(path=str(write_lines(folder / "r.jsonl", records))), folder)


@pytest.fixture
def load(tiny_folder: Path, tmp_path: Path) -> Callable[[], Any]:
    return pretrained(tiny_folder, tmp_path).load


def test_answers_are_scored_against_the_row_on_the_given_scale(rows, tokenizer):
    """Correct: "3", "4.". Bytes are tokens, and the end token is not counted. Scaled: (r − 1/2)/(1/4)."""
    scale = Scale(kind="zscore", mean=0.5, sd=0.25)
    found = score_answers(rows, TEXTS, ExactNumber(), scale, Chat(tokenizer))
    assert found.rewards is not None
    assert found.rewards.tolist() == [[2.0, -2.0], [-2.0, 2.0]]
    assert found.lengths.tolist() == [[1, 8], [0, 2]]
    assert found.finished.tolist() == [[True, False], [True, True]]
    assert found.texts == [["3", "it is 44"], ["", "4."]]


def test_drawn_tokens_are_counted_and_scored(rows, tokenizer):
    """A byte that is not text and a special token are one token each. Encoded again, their texts are 3 and 1."""
    chat = Chat(tokenizer)
    byte, user, three = 187, 258, tokenizer("3")["input_ids"][0]
    drawn = [[[byte, three, 257], [three, user]], [[257], [byte]]]
    texts = [[Sample.of(chat, ids) for ids in several] for several in drawn]
    found = score_answers(rows, texts, ExactNumber(), Scale(), chat)
    assert found.texts == [["\ufffd3", "3<user>"], ["", ""]]
    assert found.lengths.tolist() == [[2, 2], [0, 1]]
    assert found.finished.tolist() == [[True, False], [True, False]]
    for batch, row, several in zip(pack_answers(chat, rows, texts), rows, drawn, strict=True):
        ids, starts = unpack_sequences(batch)
        assert ids == [[*chat.prompt(row.prompt), *one] for one in several]
        assert starts == [len(chat.prompt(row.prompt))] * 2
    assert [len(chat.tokenize_answer(text, False)) for text in found.texts[0]] == [4, 7]


def test_without_a_reward_of_text_there_are_lengths_only(rows, tokenizer):
    for reward in (None, Score()):
        found = score_answers(rows, TEXTS, reward, Scale(), Chat(tokenizer))
        assert found.rewards is None
        assert found.lengths.tolist() == [[1, 8], [0, 2]]


def test_wrong_number_of_rewards_is_an_error(rows, tokenizer, monkeypatch):
    monkeypatch.setattr(ExactNumber, "__call__", lambda self, prompts, responses, answers: np.ones((3, 1)))
    with pytest.raises(UserError, match=r"returned 3 numbers for 4 responses"):
        score_answers(rows, TEXTS, ExactNumber(), Scale(), Chat(tokenizer))


def test_divergence_of_a_model_from_itself_is_0(rows, tokenizer, load):
    batches = pack_answers(Chat(tokenizer), rows, TEXTS)
    ours, theirs = (compute_logps(Policy(load()), batches, "cpu") for _ in range(2))
    assert np.array(divergence(batches, ours, theirs)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_divergence_is_the_difference_of_log_probabilities(rows, tokenizer, load):
    """Compare each answer with the models' logits. A finished answer counts its end token (257), a truncated one has
    none, and an empty one is its end token."""
    changed, reference = load(), load()
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(-1.5)
    done: list[int] = []
    batches = pack_answers(Chat(tokenizer), rows, TEXTS)
    ours, theirs = (compute_logps(Policy(model), batches, "cpu", done.append) for model in (changed, reference))
    found = np.array(divergence(batches, ours, theirs))
    responses = [[[*b"3", 257], [*b"it is 44"]], [[257], [*b"4.", 257]]]

    def tokens(response: list[int]) -> list[int]:
        return [t if t == 257 else tokenizer.convert_tokens_to_ids("Ġ" if t == 32 else chr(t)) for t in response]

    for prompt, several in enumerate(responses):
        ids = tokenizer("<bos><user>" + ("1 + 2", "2 + 2")[prompt] + "<end><assistant>")["input_ids"]
        for k, response in enumerate(several):
            sums = []
            for model in (changed, reference):
                with use_attention(model, "sdpa"), torch.inference_mode():
                    logits = model(input_ids=torch.tensor([ids + tokens(response)])).logits[0].log_softmax(-1)
                sums.append(sum(float(logits[len(ids) - 1 + t, y]) for t, y in enumerate(tokens(response))))
            assert_allclose(found[prompt, k], sums[0] - sums[1], atol=1e-4)
    assert abs(found).min() > 1e-2
    assert sum(done) == 4


def test_samples_hold_answers_before_and_after(rows, tokenizer):
    before = score_answers(rows, TEXTS, ExactNumber(), Scale(), Chat(tokenizer))
    after = score_answers(rows, [[Sample("3", True)] * 2] * 2, Score(), Scale(), Chat(tokenizer))
    found = json.loads(json.dumps(samples(rows, before, after)))
    empty, four, three = ([tokenizer.convert_tokens_to_ids(c) for c in text] + [257] for text in ("", "4.", "3"))
    assert found[1] == {
        "id": "r.jsonl:2", "prompt": [{"role": "user", "content": "2 + 2"}], "answer": "4",
        "before": {"texts": ["", "4."], "ids": [empty, four], "rewards": [0.0, 1.0], "lengths": [0, 2]},
        "after": {"texts": ["3", "3"], "ids": [three, three], "rewards": None, "lengths": [1, 1]},
    }  # fmt: skip
    assert set(samples(rows, None, after)[0]) == {"id", "prompt", "answer", "after"}


def test_win_rate_counts_every_pair_and_a_tie_as_half():
    """Answers 1, 3 against 1, 2: a tie, a loss, two wins; 0, 0 against 1, 2: four losses."""
    after, before = np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])
    assert win_rate(after, before).tolist() == [2.5 / 4, 0.0]
