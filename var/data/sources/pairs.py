"""Rows of preference pairs, for the adapters of such data sets."""

from typing import Any

from var.data.messages import last_text, parse_prompt, split_answer
from var.data.row import Response, Row


def make_pair(
    id: str,
    prompt: Any,
    chosen: Any,
    rejected: Any,
    scores: tuple[float | None, float | None] = (None, None),
) -> Row | None:
    """Return an ordered row, or None to skip a pair with an empty prompt or response, as public data sets have.

    A response is text or an assistant's message, which keeps its further keys, such as tool_calls.
    """
    responses = []
    for name, value, score in (("chosen", chosen, scores[0]), ("rejected", rejected, scores[1])):
        before, text, message = split_answer(value, name)
        if before:
            raise ValueError(f"the {name} response must be text or one message, got {value!r}")
        responses.append(Response(text=text, message=message, score=score))
    row = Row(id=id, prompt=parse_prompt(prompt), responses=tuple(responses), ordered=True)
    return None if is_empty(row) else row


def is_empty(row: Row) -> bool:
    """Return whether the prompt or a response has no text."""
    empty = any(not response.text.strip() and not response.message for response in row.responses)
    return empty or not last_text(row.prompt).strip()
