"""Chat templates: messages as text and as tokens, in which the text of messages cannot open or close a turn."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any
from unicodedata import normalize

from jinja2 import TemplateError, meta

from var.data.changes import describe_change
from var.data.clock import CLOCK, read_date, set_clock
from var.data.messages import Message
from var.utils.errors import UserError
from var.utils.time_limit import TimeLimitExceeded, time_limit

RENDERING = 20.0  # seconds for one conversation; a template may come from a stranger, and can loop without an end
LONGEST = 50_000_000  # characters of a rendered conversation, ten times those of a row
PROBE = "probe"  # text that every template renders unchanged

# Marks control tokens in the text of messages, after their first character, while a template renders them. It is a
# noncharacter of Unicode, which is in no text.
MARK = "\ufdd0"

USUAL = {"role", "content"}  # the keys of most messages
SPECIAL = {"bos_token", "eos_token", "pad_token", "unk_token"}  # the tokenizer's texts that templates can read


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
        ends: Iterable[Sequence[int]] = (),
    ) -> None:
        """Build the template.

        Args:
            tokenizer: has the template.
            kwargs: arguments of the template, such as enable_thinking.
            today: what the template reads as the current date; None for the clock.
            key: the setting of the template, in messages.
            ends: tokens that end a response, which are control tokens.
        """
        self.tokenizer, self.key, self.ends = tokenizer, key, {token for ids in ends for token in ids}
        self.kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
        self.today = today or read_date(None)
        if reason := self._find_unread(self.kwargs):
            raise UserError(f"{key}_kwargs: {reason}, or set {key} to a template that does.")

    @property
    def source(self) -> str:
        """The template's text, of all its variants if it has several."""
        found = self.tokenizer.chat_template
        return found if isinstance(found, str) else json.dumps(found, sort_keys=True)

    @cached_property
    def reads_clock(self) -> bool:
        """Whether the template writes the current date."""
        return CLOCK in self.source

    @property
    def fingerprint(self) -> Any:
        """What rendered text depends on besides the messages, as JSON values."""
        tokens = {name: str(self.tokenizer.special_tokens_map.get(name)) for name in sorted(SPECIAL & self._variables)}
        if not self.kwargs and not self.reads_clock and not tokens:
            return self.source
        date = self.today.isoformat() if self.reads_clock else None
        return [self.source, self.kwargs, date, *([tokens] if tokens else [])]

    def _find_unread(self, kwargs: Mapping[str, Any]) -> str:
        """Return which arguments the template does not read, or an empty text."""
        reserved = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) | {CLOCK}
        reserved |= {"messages"} | SPECIAL
        unknown = [name for name in kwargs if name in reserved or name not in self._variables]
        return f"the chat template does not read {', '.join(sorted(unknown))}. Remove this" if unknown else ""

    @cached_property
    def _variables(self) -> set[str]:
        """The names that the template, or one of its variants, reads from its arguments."""
        from transformers.utils import chat_template_utils

        found = self.tokenizer.chat_template
        try:
            sources = [found] if isinstance(found, str) else list(found.values())
            with time_limit(RENDERING, "compiling it"):  # constants are computed then
                compiled = [chat_template_utils._compile_jinja_template(source).environment for source in sources]
            parsed = [environment.parse(source) for environment, source in zip(compiled, sources, strict=True)]
        except (TemplateError, RecursionError, MemoryError, TimeLimitExceeded) as error:
            raise UserError(f"{self.key}: {type(error).__name__}: {error}") from error
        return set().union(*map(meta.find_undeclared_variables, parsed))

    @cached_property
    def _compiled(self) -> Any:
        """The template for messages without tools."""
        from transformers.utils import chat_template_utils

        compiled = chat_template_utils._compile_jinja_template(self.tokenizer.get_chat_template(None, None))
        compiled.globals = dict(compiled.globals)  # every rendering copies them, and a ChainMap is slow to copy
        return compiled

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def control_tokens(self) -> re.Pattern[str] | None:
        """Matches tokens that must not be read in the text of messages.

        They are the tokenizer's special tokens, and added tokens that end a response or that the template writes
        around turns. White space is never one: Gemma has added tokens of line ends.
        """
        added = self.tokenizer.added_tokens_decoder.items()
        written = self._render_scaffolds()
        names = {str(name) for i, name in added if name.special or i in self.ends or str(name) in written}
        names |= {*self.tokenizer.all_special_tokens, *(getattr(self.tokenizer, "chat_control_tokens", None) or ())}
        return _match_any(name for name in names if name.strip())

    def _render_scaffolds(self) -> str:
        """Return what the template writes around turns, and the first and last token of a tool's turn."""
        user, answer, system = (Message(role=role, content=PROBE) for role in ("user", "assistant", "system"))
        call = {"id": "a" * 9, "type": "function", "function": {"name": PROBE, "arguments": {}}}
        calling = [user, Message(role="assistant", content="", tool_calls=[call])]
        result = Message(role="tool", name=PROBE, tool_call_id=call["id"], content=PROBE)
        scaffolds = list[str]()
        for turns in ([user, answer, user], [system, user], [*calling, result]):
            try:
                text = self._render(turns, (), {}, False)
                if turns[-1] is result:  # its further tokens, such as <tool_response>, are in data as text
                    tokens = self.added_pattern.findall(text.removeprefix(self._render(calling, (), {}, False)))
                    text = MARK.join([*tokens[:1], *tokens[-1:]])
                scaffolds.append(text)
            except ValueError:  # the template asks for other roles
                continue
        return MARK.join(scaffolds)

    @cached_property
    def added_pattern(self) -> re.Pattern[str]:
        """Matches tokens that text is never split into, except white space."""
        names = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if str(token).strip()]
        return _match_any(names) or re.compile("(?!)")

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
        listed = list(tools) or None
        try:
            plain = not listed and all(m.keys() == USUAL and m["content"] is not None for m in messages)
            options = {"add_generation_prompt": add_generation_prompt, **self.kwargs, **kwargs}
            with time_limit(RENDERING, "rendering"):
                if self.reads_clock:
                    set_clock(self.tokenizer.get_chat_template(None, listed), self.today)
                if plain:
                    # The same text as from apply_chat_template, which converts values that plain messages do not have,
                    # and takes three times as long.
                    arguments = {**self._special_tokens, **options}
                    text = self._compiled.render(messages=list(messages), tools=None, documents=None, **arguments)
                else:
                    text = self.tokenizer.apply_chat_template(list(messages), tools=listed, tokenize=False, **options)
            return check_length(str(text))
        except Exception as error:  # expressions of a template can raise anything
            raise UserError(
                f"the chat template cannot render these messages: {type(error).__name__}: {error}"
            ) from error

    def _mark(self, value: Any) -> Any:
        """Return a JSON value with MARK within the control tokens of its texts."""
        if isinstance(value, str):
            if MARK in value:
                raise ValueError(f"its text contains the noncharacter U+{ord(MARK):X}; remove it")
            while self.control_tokens and self.control_tokens.search(value):
                value = self.control_tokens.sub(_split, value)  # once more, as the rest of a token can be another one
            return value
        if isinstance(value, Mapping):
            return {key if key in USUAL else self._mark(key): self._mark(part) for key, part in value.items()}
        return [self._mark(part) for part in value] if isinstance(value, list | tuple) else value

    def mark(self, text: str) -> str:
        """Return a text with MARK within its control tokens, as in `render`."""
        return str(self._mark(text))

    def tokenize(self, marked: str, inside: bool = False) -> Tokens:
        """Return the tokens of a text of `render`. Control tokens are read only where the template wrote them.

        inside: the text continues another. Raise a ValueError if the tokenizer reads further control tokens.
        """
        ids, offsets, begin = list[int](), list[tuple[int, int]](), 0
        for n, piece in enumerate(marked.split(MARK)):
            more, places = self._tokenize_inside(piece) if n or inside else self._tokenize(piece)
            ids += more
            offsets += [(low + begin, high + begin) for low, high in places] if begin else places
            begin += len(piece)
        if self.control_tokens and len(found := self.find_control(ids)) > len(self.control_tokens.findall(marked)):
            raise ValueError(
                f"its text contains a control token that this tokenizer cannot write as text, one of {set(found)}. "
                "Remove it"
            )
        return Tokens(ids, offsets, marked.replace(MARK, ""))

    def find_control(self, ids: Sequence[int]) -> list[str]:
        """Return the control tokens among some ids, without that for unknown characters unless it ends a response."""
        control = self._control_ids
        return [control[token] for token in ids if token in control]

    @cached_property
    def _control_ids(self) -> dict[int, str]:
        added, unknown = self.tokenizer.added_tokens_decoder.items(), {self.tokenizer.unk_token_id} - self.ends
        control = self.control_tokens or re.compile("(?!)")
        return {i: str(name) for i, name in added if control.fullmatch(str(name)) and i not in unknown}

    def find_losses(self, text: str, ids: Sequence[int]) -> list[str]:
        """Return how tokens differ from their text: characters that the tokenizer does not have or changes.

        Text is compared up to canonical equivalence, and up to white space around added tokens.
        """
        found = self.decode(ids)
        if found == text:
            return []
        around = re.compile(rf"\s*({self.added_pattern.pattern})\s*")
        found, text = (around.sub(r"\1", normalize("NFC", part)) for part in (found, text))
        return [] if found.strip() == text.strip() else [f"the tokenizer reads {describe_change(text, found)}"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return tokens as text, special tokens included."""
        return str(self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False))

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding or getattr(self.tokenizer, "split_special_tokens", False):
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(found["input_ids"]), list(found["offset_mapping"])
        encoding = backend.encode(text, add_special_tokens=False)  # the same, in a third of the time
        return encoding.ids, encoding.offsets

    def _tokenize_inside(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text that continues another. Some tokenizers put a space before a beginning."""
        for before in ("\n", "a"):  # a token can span the first one and the text
            anchor, _ = self._tokenize(before)
            ids, offsets = self._tokenize(before + text)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :], [(max(0, low - 1), high - 1) for low, high in offsets[len(anchor) :]]
        return self._tokenize(text)


def check_length(text: str) -> str:
    """Return a rendered text. Raise a ValueError if it is too long to be handled."""
    if len(text) > LONGEST:
        raise ValueError(f"the text has {len(text):,} characters, more than {LONGEST:,}")
    return text


def _match_any(names: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern of texts, the longest first as tokenizers match them, or None if there are none."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _split(match: re.Match[str]) -> str:
    if len(match[0]) == 1:
        raise ValueError(
            f"its text contains the control token {match[0]!r}, which cannot be written as text. Remove it"
        )
    return match[0][0] + MARK + match[0][1:]
