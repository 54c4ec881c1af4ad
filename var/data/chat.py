"""Chat: a prompt and a response as tokens, the position of the response in them, and the tokens that end it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

from var.data.changes import describe_change, find_content_changes, list_unwritten
from var.data.messages import Message, Prompt
from var.data.placement import Placement
from var.data.row import Response
from var.data.template import MARK, PROBE, Template, hash_tokenizer
from var.data.template_file import read_template
from var.utils.errors import UserError

OPENED = re.compile(r"(<\w+>)\s*$")  # a tag at the end of a generation prompt, such as <think>


@dataclass(frozen=True)
class Encoded:
    """The tokens of a prompt and a response."""

    ids: list[int]  # the prompt, the response and its end token
    start: int  # index of the first token of the response
    changes: tuple[str, ...] = ()  # what the template changed of the messages
    control: bool = False  # the messages contain control tokens, which are encoded as ordinary text


class Chat:
    """Render messages with a chat template and find the response in the tokens.

    The response and the end token after it are trained. Text that the template writes after the end token is dropped.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        path: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        today: date | None = None,
        eos: Mapping[str, Any] | None = None,
        size: int | None = None,
    ) -> None:
        """Build the chat.

        Args:
            tokenizer: of the model.
            template: replaces the tokenizer's.
            path: of the model, in messages.
            kwargs: arguments of the template.
            today: the date that the template reads.
            eos: end tokens of the model by the file that names them: an id, a list of ids or None.
            size: number of tokens that the model can draw, which can be more than the tokenizer has; None for those.
        """
        path = path or tokenizer.name_or_path
        self.path, self.eos = path, dict(eos or {})
        self.origin = f"the tokenizer of {path}" if template is None else "model.chat_template"
        if template is not None:
            tokenizer.chat_template = read_template(template)
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {path} has no chat template, as is usual for base models. Set "
                "model.chat_template=plain, which suits any model, or set it to a .jinja file. For the template of a "
                f"family, use its configuration: model=llama3.1-8b model.path={path}, or model=llama2-7b model.path=…"
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} gives no offsets. Use a model with a fast tokenizer"
            )
        self.tokenizer = tokenizer
        self._prepared: tuple[Prompt, tuple[str, list[int], list[str]]] | None = None
        self.size = len(tokenizer) if size is None else size
        self.template = Template(tokenizer, kwargs, today, ends=self.named_ends.values())
        self.placement = Placement(self.template)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tokenizer, without the template."""
        return hash_tokenizer(self.tokenizer)

    @cached_property
    def suffix(self) -> str:
        """The text that the template writes after an assistant's message."""
        user = {"role": "user", "content": PROBE}
        try:
            prompt = self.render([user])
            full = self.template.render([user, {"role": "assistant", "content": PROBE}])
        except ValueError as error:
            raise UserError(f"{error}. Set model.chat_template to another one.") from error
        if PROBE not in full:
            raise UserError(
                f"the chat template does not write the text of messages as it is: it renders the text {PROBE!r} as "
                f"{full!r}. Set model.chat_template to another one."
            )
        if not full.startswith(prompt) or PROBE not in full[len(prompt) :]:
            raise UserError(
                "the chat template's generation prompt is not a prefix of a rendered answer, so the response cannot be "
                f"separated from the prompt: it renders {prompt!r} and {full!r}. Set model.chat_template to another."
            )
        return full[full.rindex(PROBE) + len(PROBE) :]

    @cached_property
    def end_token(self) -> int:
        """The token that the template writes at the end of a response. It is trained.

        It is the first added token after the response (Llama 2's writes a space before it).
        """
        tokens = self.template.tokenize(self.suffix).ids
        if not tokens:
            raise UserError(
                "the chat template writes nothing after an assistant's message, so the model would never learn to "
                "stop. Set model.chat_template to one that ends a message with the end-of-sequence token"
            )
        end = next((token for token in tokens if token in self.added_tokens), None)
        if end is None:
            eos = self.tokenizer.eos_token
            advice = f", such as {eos!r}, or to plain" if eos else ". The tokenizer has no eos_token, which plain needs"
            raise UserError(
                f"the chat template ends an assistant's message with {self.suffix!r}, which begins with the token "
                f"{self.tokenizer.decode([tokens[0]])!r} of ordinary text, which an answer "
                f"can contain. Set model.chat_template to one that ends a message with a special token{advice}."
            )
        return int(end)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """All tokens that end a response: the template's, the tokenizer's and those of the model's files.

        Sampling stops at each of them. Raise a `UserError` if one is ordinary text.
        """
        ends = {self.end_token}
        for origin, ids in self.named_ends.items():
            for token in ids:
                if token not in self.added_tokens and token < len(self.tokenizer):
                    text = self.tokenizer.decode([token])
                    raise UserError(
                        f"{self.path}: {origin} names the end token {token}, which is {text!r}, so ordinary text. "
                        "Correct it."
                    )
                ends.add(int(token))
        return frozenset(ends)

    @property
    def named_ends(self) -> dict[str, list[int]]:
        """The end tokens of the tokenizer and of the model's files, by origin."""
        found = {"the tokenizer's eos_token": self.tokenizer.eos_token_id, **self.eos}
        lists = {origin: ids if isinstance(ids, list | tuple) else [ids] for origin, ids in found.items()}
        for origin, ids in lists.items():
            if not all(i is None or isinstance(i, int) for i in ids):
                raise UserError(f"{self.path}: {origin} names the end tokens {ids}. Expected numbers.")
        # Some files mark a missing token by -1, or name one that the model does not have.
        return {origin: [i for i in ids if i is not None and 0 <= i < self.size] for origin, ids in lists.items()}

    @cached_property
    def added_tokens(self) -> frozenset[int]:
        """Tokens that text is never split into: special tokens and others that were added to the vocabulary."""
        return frozenset([*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder])

    @cached_property
    def _special_tokens(self) -> frozenset[str]:
        return frozenset(self.tokenizer.all_special_tokens)

    @cached_property
    def tail(self) -> list[int]:
        """The tokens that the template writes after the end token. A reward model reads them too."""
        tokens = self.template.tokenize(self.suffix).ids
        return tokens[tokens.index(self.end_token) + 1 :]

    def complete(self, ids: list[int]) -> list[int]:
        """Return the ids of `encode` with the end token and the tail, as a reward model reads them."""
        return [*ids, *([] if ids[-1] in self.end_tokens else [self.end_token]), *self.tail]

    def render(self, prompt: Sequence[Message]) -> str:
        """Return the prompt as text, up to the first character of the response; see `Template.render`."""
        return self.template.render(prompt, prompt, add_generation_prompt=True)

    def prompt(self, prompt: Sequence[Message]) -> list[int]:
        """Return the prompt as tokens, up to the first token of the response. Raise a ValueError as `encode` does."""
        return self._check_bos(self.template.tokenize(self.render(prompt)).ids)

    def find_changes(self, prompt: Sequence[Message], rendered: str) -> list[str]:
        """Return what a rendered prompt lacks of its messages: content, further keys, tools and arguments.

        Content is compared up to surrounding white space.
        """
        changes = find_content_changes(prompt, self.placement.place_contents(prompt, rendered))
        text = rendered.replace(MARK, "")
        for i, message in enumerate(prompt):
            for key in sorted(message.keys() - {"role", "content"}):
                rest = {name: value for name, value in message.items() if name != key}
                same = self._is_same(prompt, [*prompt[:i], rest, *prompt[i + 1 :]], rendered)
                changes += _describe_key(f"{key} of the {message['role']}'s message {i}", message[key], same, text)
        if isinstance(prompt, Prompt) and prompt.tools:
            without = Prompt(prompt, (), prompt.template_kwargs)
            names = [tool.get("function", tool).get("name") for tool in prompt.tools]
            if self._is_same(without, without, rendered):
                changes.append("its tools are not written")
            elif missing := list_unwritten(names, text):
                changes.append(f"its tool {missing[0]!r} is not written")
        return changes

    def _is_same(self, prompt: Sequence[Message], messages: Sequence[Message], rendered: str, ask: bool = True) -> bool:
        try:
            return self.template.render(messages, prompt, add_generation_prompt=ask) == rendered
        except ValueError:  # the template needs what is missing
            return False

    def check_prompt(self, prompt: Sequence[Message]) -> list[str]:
        """Return what the template and the tokenizer change of a prompt."""
        return list(self._encode_alone(prompt).changes)

    def _encode_alone(self, prompt: Sequence[Message]) -> Encoded:
        """Return a prompt without a response."""
        rendered = self.render(prompt)
        tokens = self.template.tokenize(rendered)
        changes = [*self.find_changes(prompt, rendered), *self.template.find_losses(tokens.text, tokens.ids)]
        return Encoded(self._check_bos(tokens.ids), len(tokens.ids), tuple(changes), MARK in rendered)

    def _prepare(self, prompt: Sequence[Message]) -> tuple[str, list[int], list[str]]:
        """Return a prompt as text and as tokens, and what the template changes of it. The last one of a row is kept."""
        if self._prepared is not None and self._prepared[0] is prompt:
            return self._prepared[1]
        rendered = self.render(prompt)
        found = rendered, self.template.tokenize(rendered).ids, self.find_changes(prompt, rendered)
        if isinstance(prompt, Prompt):  # which nobody changes
            self._prepared = prompt, found
        return found

    def encode(
        self,
        prompt: Sequence[Message],
        response: str,
        finished: bool = True,
        further: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """Return the tokens of a prompt and a response. An unfinished response has no end token.

        further: further keys of the assistant's message. Raise a ValueError if the response cannot be located in the
        tokens.
        """
        rendered, prompt_ids, prompt_changes = self._prepare(prompt)
        message = {"role": "assistant", "content": response, **(further or {})}
        full = self.template.render([*prompt, message], prompt)
        if not full.startswith(rendered) or (not further and not full.endswith(self.suffix)):
            raise ValueError(f"the template renders the prompt differently once it is answered: {rendered[-40:]!r}")
        tokens = self.template.tokenize(full)
        ids, offsets, text = tokens.ids, tokens.offsets, tokens.text
        begin, start = len(rendered.replace(MARK, "")), len(prompt_ids)
        if ids[:start] != prompt_ids:
            # A token such as "\n    " spans the boundary. Tokenize both sides separately, as in sampling.
            rest = self.template.tokenize(full[len(rendered) :], inside=True)
            ids = prompt_ids + rest.ids
            offsets = [(0, 0)] * start + [(low + begin, high + begin) for low, high in rest.offsets]
        if further:
            ends = [t for t in range(start, len(ids)) if ids[t] in self.end_tokens]
            stop = ends[-1] if ends else None
            end = len(text) if stop is None else offsets[stop][0]
        else:
            end = len(text) - len(self.suffix)
            inside = (t for t in range(start, len(ids)) if ids[t] == self.end_token and offsets[t][1] > end)
            stop = next(inside, None)
            end = end if stop is None else max(end, offsets[stop][0])  # it may write text before the end token
        if stop is None:
            raise ValueError(
                f"the response's end token cannot be found in the rendered row. Its chat template is from {self.origin}"
            )
        if not text[begin:end].strip() and (response.strip() or stop == start):
            raise ValueError("the response is empty after rendering by the template")
        changes = [*prompt_changes, *self._find_response_changes(prompt, message, text[begin:end], full)]
        opened = OPENED.search(text[:begin])
        special = opened and opened[1] in self._special_tokens
        if opened and not special and text[begin:end].lstrip().startswith(opened[1]):
            changes.append(f"the response begins with {opened[1]}, which the generation prompt has written")
        changes += self.template.find_losses(text[:end], ids[:stop])
        return Encoded(self._check_bos(ids[: stop + finished]), start, tuple(changes), MARK in full)

    def _find_response_changes(self, prompt: Sequence[Message], message: Message, span: str, full: str) -> list[str]:
        """Return how the rendered response differs from the message."""
        further, response = message.keys() - {"role", "content"}, message["content"]
        if not further:
            return [] if span.strip() == response.strip() else [f"the response is {describe_change(response, span)}"]
        written = self.placement.find_content([*prompt, message], prompt, full)
        if written is None:
            changes = [] if response.strip() in span else [f"the response is not as written, {response[:60]!r}"]
        elif response.strip() and len(written) != 1:
            changes = [f"the response is written {len(written)} times"]
        else:
            others = [part for part in written if part.strip() != response.strip()]
            changes = [f"the response is {describe_change(response, part)}" for part in others]
        for key in sorted(further):
            rest = {name: value for name, value in message.items() if name != key}
            same = self._is_same(prompt, [*prompt, rest], full, False)
            changes += _describe_key(f"{key} of the response", message[key], same, span)
        return changes

    def encode_response(self, prompt: Sequence[Message], response: Response) -> Encoded:
        """Return the tokens of a prompt and a row's response. Sampled tokens are taken as they are.

        They are read as text if they are another tokenizer's, or if the text was edited.
        """
        if response.ids is None or not self.wrote(response.text, response.finished, response.ids):
            return self.encode(prompt, response.text, response.finished, response.message)
        asked = self._encode_alone(prompt)
        return replace(asked, ids=[*asked.ids, *response.ids])

    def wrote(self, text: str, finished: bool, ids: Sequence[int]) -> bool:
        """Return whether the tokens of a sampled response are this model's, and are its text."""
        return all(token < self.size for token in ids) and (self.decode(ids), self.is_finished(ids)) == (text, finished)

    def is_finished(self, ids: Sequence[int]) -> bool:
        """Return whether sampled tokens end with an end token."""
        return bool(ids) and ids[-1] in self.end_tokens

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, without their end token.

        Other special tokens are kept. If sampling ended within a character, the text ends before it.
        """
        if self.is_finished(ids):
            return self.template.decode(ids[:-1])
        return self.template.decode(ids).rstrip("\ufffd")

    def tokenize_answer(self, text: str, finished: bool) -> list[int]:
        """Return the tokens of an answer that came as text, with the end token if it is finished or empty."""
        ids = self.template.tokenize(self.template.mark(text)).ids
        return [*ids, self.end_token] if finished or not ids else ids

    def _check_bos(self, ids: list[int]) -> list[int]:
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise ValueError(f"two BOS tokens ({self.tokenizer.bos_token}) at the start: the template writes both")
        return ids


def _describe_key(name: str, value: Any, same: bool, text: str) -> list[str]:
    """Return what a rendered text lacks of a further key of a message; same: it is the same without the key."""
    if value in ("", [], {}):
        return []
    if same:
        return [f"{name} is not written"]
    return [f"{name} is written without {part[:60]!r}" for part in list_unwritten(value, text)[:1]]
