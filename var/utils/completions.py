"""Read the reply of an OpenAI-compatible server, which may lack any part."""

from collections.abc import Mapping
from typing import Any

from var.utils.files import replace_surrogates

MAX_TOKENS = 10**9  # of one reply; a larger count is an error of the server


def get_text(reply: Mapping[str, Any]) -> str | None:
    """Return the text of a chat completion, or None if it has none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return None
    return replace_surrogates(content) if isinstance(content, str) else None


def find_missing_text(reply: Mapping[str, Any]) -> str | None:
    """Return a reason if a chat completion has no text, else None. For `Client.ask(find_fault=…)`."""
    return None if get_text(reply) is not None else f"no text in the reply {str(reply)[:120]}"


def count_tokens(reply: Mapping[str, Any], name: str) -> int:
    """Return a count of the reply's `usage`, or 0 if it is missing or negative. Some servers write it as text."""
    try:
        return min(max(int(reply["usage"][name]), 0), MAX_TOKENS)
    except (LookupError, TypeError, ValueError, OverflowError):
        return 0
