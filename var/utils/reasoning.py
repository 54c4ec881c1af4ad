"""Separate the reasoning of a model that thinks aloud from its answer, in text and in chat completions."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from var.utils.files import replace_surrogates

# The marks of Qwen, DeepSeek and most others; then Mistral's, Cohere's, Kimi's and gpt-oss's.
NAMES = r"(?:think|thinking|thoughts?|reasoning|seed:think)"
START = rf"<{NAMES}>|\[THINK\]|<\|START_THINKING\|>|◁think▷|<\|channel\|>analysis<\|message\|>"
END = rf"</{NAMES}>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷|<\|channel\|>final<\|message\|>"
QUOTED = "(?![`'\"”’])"  # a closing quote follows a mark that the text only mentions
BLOCK = re.compile(rf"(?:{START}).*?(?:{END}){QUOTED}", re.DOTALL | re.IGNORECASE)
OPENED = re.compile(rf"^\s*(?:{START}){QUOTED}", re.MULTILINE | re.IGNORECASE)
CLOSED = re.compile(rf"(?:{END}){QUOTED}", re.IGNORECASE)

FIELDS = ("reasoning_content", "reasoning", "thinking")  # of a message, where a server puts the reasoning


class UnfinishedReasoning(ValueError):
    """A text that ends inside its reasoning."""


def strip_reasoning(text: str) -> str:
    """Return the text without its reasoning. Raise UnfinishedReasoning if it ends inside it.

    If the first mark is an end, as where the chat template starts the reasoning, everything before it is reasoning.
    """
    answer = CLOSED.split(BLOCK.sub("", text))[-1]
    if OPENED.search(answer):
        raise UnfinishedReasoning
    return answer


def read_answer(reply: Mapping[str, Any]) -> str | None:
    """Return the text of a chat completion without its reasoning, or None if it has no text.

    Raise UnfinishedReasoning if it has nothing else.
    """
    content, reasoning = _read_message(reply)
    answer = None if content is None else strip_reasoning(content)
    if reasoning and not (answer or "").strip():
        raise UnfinishedReasoning
    return answer


def find_answer(reply: Mapping[str, Any], tokens: Sequence[str]) -> int:
    """Return the index of the answer's first token, given the text of each token of the reply.

    Without reasoning it is 0. Raise UnfinishedReasoning as `read_answer` does, and a LookupError if the tokens do not
    contain the answer.
    """
    content, reasoning = _read_message(reply)
    answer = read_answer(reply)
    if answer is None or (answer == content and not reasoning):
        return 0
    text, start, found = "".join(tokens), 0, None
    for i, token in enumerate(tokens):
        if token.strip() and text.startswith(answer.strip(), start + len(token) - len(token.lstrip())):
            found = i  # the last one: the reasoning may contain the answer
        start += len(token)
    if found is None:
        raise LookupError(answer)
    return found


def _read_message(reply: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the text of a chat completion or None, and its reasoning where the server separates it."""
    try:
        message = reply["choices"][0]["message"]
        content, fields = message["content"], [message.get(name) for name in FIELDS]
    except (LookupError, TypeError, AttributeError):
        return None, ""
    reasoning = "".join(value for value in fields if isinstance(value, str))
    if isinstance(content, list):  # parts, as Mistral's server sends them
        parts = [part for part in content if isinstance(part, Mapping)]
        reasoning += "".join(str(part["thinking"]) for part in parts if "thinking" in part)
        texts = [str(part["text"]) for part in parts if "text" in part]
        content = "".join(texts) if texts else None
    return replace_surrogates(content) if isinstance(content, str) else None, reasoning
