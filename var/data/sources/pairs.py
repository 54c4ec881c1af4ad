"""What the adapters of preference pairs share."""

from typing import Any

from var.data.rows import Response, Row, messages


def pair(
    id: str,
    prompt: Any,
    chosen: str,
    rejected: str,
    scores: tuple[float | None, float | None] = (None, None),
) -> Row | None:
    """An ordered row; None, so left out and counted, where a public set has an empty prompt or response."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str):
            raise ValueError(f"the {name} response must be text, got {text!r}")
    if not chosen.strip() or not rejected.strip() or not (asked := messages(prompt))[-1]["content"].strip():
        return None
    responses = tuple(Response(text=text, score=score) for text, score in zip((chosen, rejected), scores, strict=True))
    return Row(id=id, prompt=asked, responses=responses, ordered=True)
