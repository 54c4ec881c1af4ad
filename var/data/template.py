"""Chat templates: messages as text and as tokens, in which the text of messages cannot open or close a turn."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from var.data.messages import Message
from var.utils.errors import UserError

PROBE = "probe"  # text that every template renders unchanged
CLOCK = "strftime_now"  # the function with which a template reads the clock

# Marks control tokens in the text of messages, after their first character, while a template renders them. It is a
# noncharacter of Unicode, which is in no text.
MARK = "\ufdd0"

# The template `plain`, for base models: any tokenizer has these characters and an end-of-sequence token.
PLAIN = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
  {{- '### ' + message['role'] | capitalize + ':\n' + message['content'] }}
  {{- eos_token if message['role'] == 'assistant' else '' }}
  {{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"""


def read_template(value: str, key: str = "model.chat_template") -> str:
    """Return a chat template: `value` itself, the text of a .jinja file, or the template `plain`."""
    if value == "plain":
        return PLAIN
    if not value.endswith(".jinja"):
        return value
    file = Path(value).expanduser()
    if not file.is_file():
        raise UserError(f"{key}={value} is not a file. Set it to a Jinja template, a .jinja file or plain.")
    return file.read_text()


def read_date(value: str | None, file: Path | None = None) -> date:
    """Return the date in the setting model.date or, if it is None, in a file that may exist, or today's."""
    try:
        if value is None and file is not None and file.exists():
            return date.fromisoformat(file.read_text())
        return date.today() if value is None else date.fromisoformat(str(value))
    except ValueError as error:
        raise UserError(f"model.date: expected a date such as 2024-07-26, got {value!r}") from error


def hash_tokenizer(tokenizer: Any) -> str:
    """Return a hash of how a tokenizer maps text to ids, without its padding and truncation settings."""
    if tokenizer.is_fast:
        state: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {name: part for name, part in state.items() if name not in ("padding", "truncation")}
        text = json.dumps(state, sort_keys=True)
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Tokens:
    """A rendered text as tokens."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # of each token in the text
    text: str


class Template:
    """A tokenizer's chat template with its arguments.

    The template writes the only BOS: tokens come from the rendered text with add_special_tokens=False. Control tokens
    in the text of messages are split into tokens of ordinary text.
    """

    def __init__(
        self,
        tokenizer: Any,
        kwargs: Mapping[str, Any] | None = None,
        today: date | None = None,
        key: str = "model.chat_template",
    ) -> None:
        """Build the template.

        Args:
            tokenizer: has the template.
            kwargs: arguments of the template, such as enable_thinking.
            today: what the template reads as the current date; None for the clock.
            key: the setting of the template, in messages.
        """
        self.tokenizer, self.key = tokenizer, key
        self.kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
        self.today = today or date.today()
        if reason := self._find_unread(self.kwargs):
            raise UserError(f"{key}_kwargs: {reason}, or set {key} to a template that does.")

    @property
    def source(self) -> str:
        """The template's text, of all its variants if it has several."""
        found = self.tokenizer.chat_template
        return found if isinstance(found, str) else json.dumps(found, sort_keys=True)

    @property
    def reads_clock(self) -> bool:
        """Whether the template writes the current date."""
        return CLOCK in self.source

    @property
    def fingerprint(self) -> Any:
        """What rendered text depends on besides the messages, as JSON values."""
        if not self.kwargs and not self.reads_clock:
            return self.source
        return [self.source, self.kwargs, self.today.isoformat() if self.reads_clock else None]

    def _find_unread(self, kwargs: Mapping[str, Any]) -> str:
        """Return which arguments the template does not read, or an empty text."""
        reserved = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) | {CLOCK}
        unknown = [name for name in kwargs if name in reserved or not re.search(rf"\b{re.escape(name)}\b", self.source)]
        return f"the chat template does not read {', '.join(sorted(unknown))}. Remove this" if unknown else ""

    @cached_property
    def control_tokens(self) -> re.Pattern[str] | None:
        """Matches tokens that must not be read in the text of messages.

        They are the tokenizer's special tokens and those that the template writes around turns, which some models
        have as ordinary added tokens.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        turns = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
        try:
            scaffold = self._render(turns, (), {}, False)
        except ValueError:  # the template asks for other roles
            scaffold = ""
        names = {str(token) for token in added if token.special or str(token) in scaffold}
        names |= set(self.tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def render(
        self, messages: Sequence[Message], prompt: Sequence[Message] = (), add_generation_prompt: bool = False
    ) -> str:
        """Return messages as text, with MARK within control tokens that the messages contain.

        prompt: has the tools and the arguments of the row. Raise a ValueError if the template cannot render them.
        """
        kwargs = dict(getattr(prompt, "template_kwargs", {}))
        if reason := kwargs and self._find_unread(kwargs):
            raise ValueError(f"chat_template_kwargs: {reason}")
        tools = list(getattr(prompt, "tools", ()))
        text = self._render(self._mark(list(messages)), self._mark(tools), self._mark(kwargs), add_generation_prompt)
        if "\\ufdd0" in text.lower():
            raise ValueError("the chat template escapes characters, so control tokens in its messages cannot be found")
        return text

    def _render(
        self, messages: Sequence[Any], tools: Sequence[Any], kwargs: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=list(tools) or None, tokenize=False,
                    add_generation_prompt=add_generation_prompt, **{CLOCK: self._format_date, **self.kwargs, **kwargs},
                )
            )  # fmt: skip
        except Exception as error:  # expressions of a template can raise anything
            raise ValueError(
                f"the chat template cannot render these messages: {type(error).__name__}: {error}"
            ) from error

    def _format_date(self, form: str) -> str:
        return datetime(self.today.year, self.today.month, self.today.day).strftime(form)

    def _mark(self, value: Any) -> Any:
        """Return a JSON value with MARK within the control tokens of its texts."""
        if isinstance(value, str):
            if MARK in value:
                raise ValueError(f"its text contains the noncharacter U+{ord(MARK):X}; remove it")
            return self.control_tokens.sub(_split, value) if self.control_tokens else value
        if isinstance(value, Mapping):
            return {self._mark(key): self._mark(part) for key, part in value.items()}
        return [self._mark(part) for part in value] if isinstance(value, list | tuple) else value

    def mark(self, text: str) -> str:
        """Return a text with MARK within its control tokens, as in `render`."""
        return str(self._mark(text))

    def tokenize(self, marked: str) -> Tokens:
        """Return the tokens of a text of `render`. Control tokens are read only where the template wrote them.

        Raise a ValueError if the tokenizer cannot write one as ordinary text.
        """
        pieces = marked.split(MARK)
        ids, offsets = self._tokenize(pieces[0])
        begin = len(pieces[0])
        for piece in pieces[1:]:
            more, places = self._tokenize_inside(piece)
            ids += more
            offsets += [(low + begin, high + begin) for low, high in places]
            begin += len(piece)
        text = "".join(pieces)
        if len(pieces) > 1 and (
            any(self._is_control(piece) for piece in pieces if len(piece) < 2)
            or self.decode(ids) not in (text, self.decode(self._tokenize(text)[0]))
        ):
            found = sorted(set(re.findall("(?s)(." + MARK + ".{,12})", marked)))
            raise ValueError(
                f"its text contains a control token that this tokenizer cannot write as text: {found[0]!r}. Remove it"
            )
        return Tokens(ids, offsets, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return tokens as text, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _tokenize_inside(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text that continues another. Some tokenizers put a space before a beginning."""
        anchor, _ = self._tokenize("\n")
        ids, offsets = self._tokenize("\n" + text)
        if ids[: len(anchor)] != anchor:
            return self._tokenize(text)
        return ids[len(anchor) :], [(max(0, low - 1), high - 1) for low, high in offsets[len(anchor) :]]

    def _is_control(self, text: str) -> bool:
        return bool(self.control_tokens and self.control_tokens.fullmatch(text))


def _split(match: re.Match[str]) -> str:
    return match[0][0] + MARK + match[0][1:]


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
