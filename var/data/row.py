"""A row, a prompt with its responses, and what is often asked of all rows."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from var.data.messages import Message, Prompt, prompt_content, render_message, texts_in
from var.utils.provenance import hash_content

ENDS = re.compile(r"(<\|[^<>|]{1,40}\|>|</s>|<eos>|<end_of_turn>|\s)+")
"""Control tokens of common models, which may be another model's than the one that trains."""

EQUAL_RESPONSES = "rows with a repeated response"
EQUAL_PAIRS = "pairs of equal responses"
EQUAL_SCORES = "pairs with equal scores"
REVERSED_SCORES = "pairs whose rejected response has the higher score"
ONLY_END = "rows with a response of control tokens only"

KINDS = (EQUAL_RESPONSES, EQUAL_PAIRS, EQUAL_SCORES, REVERSED_SCORES)
"""Kinds of degenerate rows that do not depend on a tokenizer; the n-th is bit 2ⁿ of the field `kinds` of FACTS."""

FACTS = np.dtype(
    [
        ("prompt", "S16"),  # content hash of the prompt
        ("text", "S16"),  # hash of its texts without case and repeated spaces
        ("responses", "i4"),  # number of responses
        ("ordered", "?"),  # they are in order of preference
        ("sampled", "?"),  # sample.py wrote the row
        ("kinds", "u1"),  # of degenerate rows, as bits
        ("suspect", "?"),  # a response may consist of control tokens
    ]
)
"""What is asked of all rows at each start. It is stored in a file of its own, so that no text is decoded for it."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response to a prompt."""

    text: str
    score: float | None = None  # the data set's own reward, in reward units
    weight: float | None = None  # for loss=weighted, without a unit
    source: str | None = None  # the model or person that wrote it
    finished: bool = True  # False: sampling was truncated, so the response is trained without an end token
    ids: tuple[int, ...] | None = None  # the sampled tokens, with the end token, which are trained as they are
    message: Mapping[str, Any] = field(default_factory=dict)  # further keys of the message, such as tool_calls

    @property
    def as_text(self) -> str:
        """The text with its tool calls as JSON, for readers without the chat template, such as rewards and judges."""
        return render_message({**self.message, "content": self.text}) if self.message else self.text


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt and its responses."""

    id: str  # unique in the data set
    prompt: Prompt  # the last message is not the assistant's
    responses: tuple[Response, ...] = ()  # empty: the prompt is to be sampled
    ordered: bool = False  # the responses are in order of preference, best first
    answer: str | None = None  # the reference answer of a programmatic reward
    subset: str | None = None  # part of the data set; results are reported per subset
    sampling: str | None = None  # JSON written by sample.py: how the responses were sampled


def state_facts(row: Row) -> tuple[Any, ...]:
    """Return the record of a row in FACTS."""
    kinds = sum(1 << KINDS.index(kind) for kind in find_degenerate(row) if kind in KINDS)
    texts = [response.text.strip() for response in row.responses]
    suspect = any(text and not text[0].isalnum() for text in texts)
    key, text = hash_content(prompt_content(row.prompt)), hash_content(normalize(row.prompt))
    return key, text, len(texts), row.ordered, row.sampling is not None, kinds, suspect


def find_degenerate(row: Row, special: Collection[str] = ()) -> Iterator[str]:
    """Yield the kinds of degenerate rows that a row belongs to."""
    contents = [
        (r.text.strip(), json.dumps(dict(r.message), sort_keys=True) if r.message else "{}") for r in row.responses
    ]
    if len(set(contents)) < len(contents):
        yield EQUAL_RESPONSES
    if any(text and message == "{}" and _has_no_word(text, special) for text, message in contents):
        yield ONLY_END
    if not row.ordered or len(contents) < 2:
        return
    if contents[0] == contents[-1]:
        yield EQUAL_PAIRS
    best, worst = row.responses[0].score, row.responses[-1].score
    if best is not None and worst is not None and best <= worst:
        yield EQUAL_SCORES if best == worst else REVERSED_SCORES


def _has_no_word(text: str, special: Collection[str]) -> bool:
    for token in special:
        text = text.replace(token, "")
    return not text.strip() or ENDS.fullmatch(text) is not None


def normalize(prompt: Sequence[Message]) -> str:
    """Return the texts of a prompt without case and repeated spaces."""
    return " ".join(" ".join(texts_in(list(prompt))).casefold().split())
