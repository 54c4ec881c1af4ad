"""The answer after a model's reasoning, in the ways that models and servers mark it."""

import pytest

from tests.helpers.servers import completion
from var.utils.reasoning import UnfinishedReasoning, find_answer, read_answer, strip_reasoning

ANSWERS = [
    ("[[A]]", "[[A]]", "no reasoning"),
    ("<think>B? [[B]]</think>\n\n[[A]]", "[[A]]", "Qwen and DeepSeek"),
    ("<think>\n\n</think>\n\n[[A]]", "[[A]]", "empty reasoning"),
    ("B? [[B]]</think>[[A]]", "[[A]]", "the chat template has written the start"),
    ("<THINKING>[[B]]</THINKING> [[A]]", "[[A]]", "other names"),
    ("[THINK][[B]][/THINK][[A]]", "[[A]]", "Mistral"),
    ("<|channel|>analysis<|message|>[[B]]<|end|><|channel|>final<|message|>[[A]]", "[[A]]", "gpt-oss"),
    ("<think>a</think>[[A]]<think>[[B]]?</think>", "[[A]]", "reasoning after the verdict too"),
    ("<think>It says <think>x</think> [[B]]</think>[[A]]", "[[A]]", "it quotes reasoning"),
    ("<think>It ends with </think> [[B]].</think>[[A]]", "[[A]]", "it quotes an end"),
    ("<think>x</think>[[A]] has a `</think>` tag", "[[A]] has a `</think>` tag", "a mention in quotes"),
    ("[[A]], which has no <think> tag", "[[A]], which has no <think> tag", "a start inside a line is a mention"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer", "reason"), ANSWERS)
def test_answer_follows_the_reasoning(text: str, answer: str, reason: str) -> None:
    assert strip_reasoning(text).strip() == answer, reason
    assert str(read_answer(completion(text))).strip() == answer


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_server_separates_the_reasoning(name: str) -> None:
    assert read_answer(completion("[[A]]", reasoning={name: "[[B]]?"})) == "[[A]]"
    for empty in (None, "", "\n"):
        with pytest.raises(UnfinishedReasoning):
            read_answer(completion(empty, reasoning={name: "[[B]]?"}))
    assert read_answer(completion("[[A]]", reasoning={name: None})) == "[[A]]"


def test_content_in_parts() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "[[B]]"}]}, {"type": "text", "text": "[[A]]"}]
    assert read_answer(completion(parts)) == "[[A]]"
    with pytest.raises(UnfinishedReasoning):
        read_answer(completion(parts[:1]))


@pytest.mark.parametrize("text", ["<think>B? [[B]]", "<think>", "<think>a</think>\n<think>[[B]]", "[THINK] [[B]]"])
def test_reasoning_without_an_end_has_no_answer(text: str) -> None:
    with pytest.raises(UnfinishedReasoning):
        strip_reasoning(text)


def test_reply_without_text_has_no_answer() -> None:
    assert [read_answer(reply) for reply in ({}, {"choices": []}, completion(None), {"choices": [None]})] == [None] * 4


def test_token_of_the_answer() -> None:
    tokens = ["<think>", "m", "?", "</think>", "\n\n", "m", "<|im_end|>"]
    assert find_answer(completion("m"), ["m"]) == 0
    assert find_answer({}, ["m"]) == 0
    assert find_answer(completion("<think>m?</think>\n\nm"), tokens) == 5
    assert find_answer(completion("m", reasoning={"reasoning_content": "m?"}), tokens) == 5
    assert find_answer(completion("m", reasoning={"reasoning_content": "m?"}), ["m"]) == 0
    with pytest.raises(LookupError):
        find_answer(completion("M", reasoning={"reasoning_content": "m?"}), tokens)
