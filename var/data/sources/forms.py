"""Forms of records: which columns hold prompts, responses and scores.

The form of a data set is that of its first record.
A form converts a record to the form of rows, which `parse_row` checks.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any

from var.data.messages import parse_message, split_answer
from var.data.parse import FLAGS, KEYS, get_number

PROMPT = ("prompt", "instruction", "question")
RESPONSE = ("response", "completion", "output")
COMMON = ("id", "answer", "subset", "tools", "chat_template_kwargs")


@dataclass(frozen=True, eq=False)
class Form:
    """A form of records."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    """The columns that each record has. The first name of each tuple that is a column is used."""
    options: tuple[str, ...]
    """Columns that it may have, in addition to `COMMON`."""
    example: Mapping[str, Any]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Return what it adds to the common columns. Columns have the first names of `needs`."""
    single: bool = False
    """Whether a record has one response, so that records with equal prompts are one row."""

    def matches(self, columns: Collection[str]) -> bool:
        """Return whether these columns suffice."""
        return all(set(names) & set(columns) for names in self.needs)


def _convert_row(record: Mapping[str, Any]) -> dict[str, Any]:
    return dict(record)


def _convert_single(record: Mapping[str, Any]) -> dict[str, Any]:
    response = record["response"]
    if isinstance(response, list) and not any(isinstance(part, dict) and "role" in part for part in response):
        raise ValueError("'response' is a list. The column of several responses is 'responses'")
    before, text, message = split_answer(_filled(response), "response")
    if before:
        raise ValueError("'response' has several messages, and only one can be trained. Put the others into the prompt")
    prompt = record["prompt"]
    if more := record.get("input"):
        if not isinstance(prompt, str) or not isinstance(more, str):
            raise ValueError(f"'input' must be text that follows a text, got {more!r}")
        prompt = f"{prompt}\n\n{more}"
    return {"prompt": prompt, "responses": [{**_get_scores(record), "text": text, "message": message}]}


def _convert_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    messages = record["messages"]
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"'messages' must be a list of messages, got {messages!r}")
    if parse_message(messages[-1])["role"] != "assistant":
        return {"prompt": messages}
    before, text, message = split_answer(messages, "messages")
    if not before:
        raise ValueError("'messages' has no message before the assistant's")
    return {"prompt": before, "responses": [{**_get_scores(record), "text": text, "message": message}]}


def _get_scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record with one response says of it."""
    found = {key: record[key] for key in ("score", "weight", "source", "finished") if key in record}
    if "reward" in record and "score" not in record:
        found["score"] = get_number(record, "reward")
    if "label" in record and "score" not in found:
        found["score"] = _parse_label(record["label"])
    return found


def _convert_pair(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pair, the chosen response first."""
    chosen, rejected = (_filled(record[key]) for key in ("chosen", "rejected"))
    prompt = _filled(record["prompt"]) if "prompt" in record else None
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_texts(chosen, rejected)
    (before, *best), (other, *worst) = split_answer(chosen, "chosen"), split_answer(rejected, "rejected")
    if before != other:
        raise ValueError("'chosen' and 'rejected' differ before their last message")
    if before:
        if isinstance(prompt, list) and prompt != before:
            raise ValueError("'chosen' and 'rejected' have other messages before the answer than 'prompt'")
        if isinstance(prompt, str) and prompt.strip() not in {(m.get("content") or "").strip() for m in before} | {""}:
            raise ValueError("'prompt' is not among the messages before the answer in 'chosen' and 'rejected'")
        prompt = before
    if prompt is None:
        raise ValueError("missing 'prompt'")
    for name in PAIR_OPTIONS:
        get_number(record, name)  # an error names this key
    responses = [
        {"text": text, "message": message, "score": record.get(f"score_{name}")}
        for name, (text, message) in (("chosen", best), ("rejected", worst))
    ]
    return {"prompt": prompt, "responses": responses, "ordered": True}


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the words that both texts begin with, and what follows in each. A space belongs to what follows."""
    if chosen.startswith("\n\nHuman:"):
        raise ValueError("the texts are dialogues of HH-RLHF. Set data=hh_rlhf")
    same = (a == b for a, b in zip(chosen, rejected, strict=False))
    length = sum(takewhile(bool, same))
    while length and (_is_inside_word(chosen, length) or _is_inside_word(rejected, length)):
        length -= 1
    prompt = chosen[:length].rstrip()
    if not prompt:
        raise ValueError(
            "no column has the prompt, and 'chosen' and 'rejected' do not begin with the same words. Name its column "
            "with data.columns='{prompt: …}'"
        )
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _is_inside_word(text: str, at: int) -> bool:
    before, after = text[at - 1], text[at : at + 1]
    return before.isalnum() and after.isalnum() and before < "\u2e80"  # Chinese and Japanese have no spaces


def _filled(value: Any) -> Any:
    """Return a text or messages. A missing text is empty."""
    return "" if value is None else value


def _parse_label(value: Any) -> float | None:
    """Return 1 for a desirable response and 0 for an undesirable one."""
    flag = {**FLAGS, "1": True, "0": False, "1.0": True, "0.0": False}.get(str(value).strip().lower())
    if flag is None:
        raise ValueError(f"'label' must be true or false, got {value!r}")
    return float(flag)


SCORES = ("score", "reward", "label")  # the first of these that a record has is the score
PAIR_OPTIONS = ("score_chosen", "score_rejected")
TURNS = [{"role": "user", "content": "How do tides work?"}, {"role": "assistant", "content": "The moon …"}]
ROWS = Form(
    "rows", (PROMPT,), tuple(KEYS),
    {"prompt": "How do tides work?", "responses": [{"text": "The moon …", "score": 1.5}, "They come …"]}, _convert_row,
)  # fmt: skip
PAIRS = Form(
    "pairs", (("chosen",), ("rejected",), PROMPT), PAIR_OPTIONS,
    {"prompt": "How do tides work?", "chosen": "The moon …", "rejected": "They come …"}, _convert_pair,
)  # fmt: skip
IMPLICIT = Form(
    "pairs that begin with their prompt", (("chosen",), ("rejected",)), PAIR_OPTIONS,
    {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "They come …"}]}, _convert_pair,
)  # fmt: skip
SINGLE = Form(
    "one response per record", (RESPONSE, PROMPT), ("input", *SCORES, "weight", "source", "finished"),
    {"prompt": "How do tides work?", "response": "The moon …", "score": 1.5}, _convert_single, single=True,
)  # fmt: skip
MESSAGES = Form(
    "conversations, whose last message is the response", (("messages", "conversations"),), (*SCORES, "weight"),
    {"messages": TURNS}, _convert_messages, single=True,
)  # fmt: skip
FORMS = (PAIRS, IMPLICIT, SINGLE, MESSAGES, ROWS)
NAMES = sorted({name for form in FORMS for name in (*chain(*form.needs), *form.options, *COMMON)})


def find_form(columns: Collection[str]) -> Form | None:
    """Return the form of a record that has values in these columns. A list of responses precedes all other forms."""
    if "responses" in columns and ROWS.matches(columns):
        return ROWS
    return next((form for form in FORMS if form.matches(columns)), None)
