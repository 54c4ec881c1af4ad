"""Rows of preference pairs, for the adapters of such data sets."""

from typing import Any

from var.data.messages import last_text, parse_prompt
from var.data.rows import Response, Row


def make_pair(
    id: str,
    prompt: Any,
    chosen: str,
    rejected: str,
    scores: tuple[float | None, float | None] = (None, None),
) -> Row | None:
    """Return an ordered row, or None to skip a pair with an empty prompt or response, as public data sets have."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str):
            raise ValueError(f"the {name} response must be text, got {text!r}")
    if not chosen.strip() or not rejected.strip():
        return None
    messages = parse_prompt(prompt)
    if not last_text(messages).strip():
        return None
    responses = tuple(Response(text=text, score=score) for text, score in zip((chosen, rejected), scores, strict=True))
    return Row(id=id, prompt=messages, responses=responses, ordered=True)
