"""What chat templates change of rows: counted, listed with examples, and an error unless it is accepted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from var.data.messages import Message
from var.data.settings import OnTemplateChange
from var.utils.console import warn
from var.utils.errors import Problems

SHOWN = 3  # examples in a warning
KEPT = 10_000  # differences that are kept; all rows are counted

ADVICE = (
    "In a difference, [-…-] is missing and {+…+} is added. Set model.chat_template to a template that keeps the text, "
    "or model.chat_template_kwargs to its arguments. data.on_template_change=count trains on what it writes."
)


@dataclass
class TemplateChanges:
    """Rows that a chat template changes."""

    found: list[tuple[str, str]] = field(default_factory=list)
    """(row, change) of the first KEPT differences."""
    rows: int = 0
    """How many rows."""

    def add(self, where: str, changes: Sequence[str]) -> None:
        """Add the changes of one row."""
        self.rows += bool(changes)
        if len(self.found) < KEPT:
            self.found += [(where, change) for change in changes]

    def settle(self, setting: OnTemplateChange) -> None:
        """Raise one UserError for all changes, or warn with the first ones if they are accepted."""
        if setting == "error":
            problems = Problems(f"rows that the chat template does not write as they are: {self.rows}; differences")
            for where, change in self.found:
                problems.add(where, change)
            problems.check(ADVICE)
        elif self.rows:
            examples = "; ".join(f"{where}: {change}" for where, change in self.found[:SHOWN])
            warn(f"the chat template changes {self.rows} rows, which train as it writes them. {examples}")


def find_content_changes(prompt: Sequence[Message], places: Sequence[tuple[int, str]]) -> list[str]:
    """Return which contents of a prompt a template writes differently, not at all, or in another order.

    places: the written contents with the indices of their messages, in the order of the text.
    """
    changes, order = list[str](), [i for i, _ in places]
    for i, message in enumerate(prompt):
        content = (message.get("content") or "").strip()
        written = [part.strip() for number, part in places if number == i]
        if not content:
            continue
        if not written:
            changes.append(f"the {message['role']}'s message {i} is not as written, {content[:60]!r}")
        elif others := [part for part in written if part != content and part not in _as_json(content)]:
            changes.append(f"the {message['role']}'s message {i} is {describe_change(content, others[0])}")
        elif any(number > i for number in order[: order.index(i)]):
            changes.append(f"the {message['role']}'s message {i} is in another place")
    return changes


def list_unwritten(value: Any, text: str) -> list[str]:
    """Return the texts and numbers in a further key of a message that a rendered text lacks.

    They may be escaped as in JSON. The ids and types of tool calls are left out, which few templates write.
    """
    if isinstance(value, Mapping):
        return [leaf for key in value if key not in ("id", "type") for leaf in list_unwritten(value[key], text)]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in list_unwritten(part, text)]
    if value is None or isinstance(value, bool):
        return []
    leaf = str(value).strip()
    return [] if any(form in text for form in (leaf, *_as_json(leaf))) else [leaf]


def _as_json(text: str) -> tuple[str, str]:
    """Return a text as it is written within JSON, without and with characters beyond ASCII."""
    return json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def describe_change(expected: str, found: str) -> str:
    """Return how a text differs from what was expected: what is missing as [-…-] and what was added as {+…+}."""
    expected, found = expected.strip(), found.strip()
    shorter = min(len(expected), len(found))
    begin = next((i for i in range(shorter) if expected[i] != found[i]), shorter)
    end = next((i for i in range(shorter - begin) if expected[-1 - i] != found[-1 - i]), shorter - begin)
    missing, added = expected[begin : len(expected) - end], found[begin : len(found) - end]
    before, after = expected[max(0, begin - 20) : begin], expected[len(expected) - end :][:20]
    parts = [f"[-{_shorten(missing)}-]" * bool(missing), f"{{+{_shorten(added)}+}}" * bool(added)]
    return repr(f"{'…' * (begin > 20)}{before}{''.join(parts)}{after}{'…' * (end > 20)}")[1:-1]


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}"
