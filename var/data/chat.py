"""Chat templates: messages to token ids, and the position of the response in them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from var.data.messages import Message
from var.utils.errors import UserError

PROBE = "probe"  # a response that every template renders unchanged

# The template `plain`, for base models: any tokenizer has these characters and an end-of-sequence token.
PLAIN = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
  {{- '### ' + message['role'] | capitalize + ':\n' + message['content'] }}
  {{- eos_token if message['role'] == 'assistant' else '' }}
  {{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a prompt and a response."""

    ids: list[int]  # the prompt, the response and its end token
    start: int  # index of the first token of the response


def hash_tokenizer(tokenizer: Any) -> str:
    """Return a hash of how a tokenizer maps text to ids, without its padding and truncation settings."""
    if tokenizer.is_fast:
        state: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {name: part for name, part in state.items() if name not in ("padding", "truncation")}
        text = json.dumps(state, sort_keys=True)
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_template(value: str, key: str = "model.chat_template") -> str:
    """Return a chat template: `value` itself, the text of a .jinja file, or the template `plain`."""
    if value == "plain":
        return PLAIN
    if not value.endswith(".jinja"):
        return value
    file = Path(value).expanduser()
    if not file.is_file():
        raise UserError(f"{key}={value}: there is no such file. Set it to a Jinja template, a .jinja file or plain.")
    return file.read_text()


def render_messages(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Return messages as text, rendered by the tokenizer's chat template in Jinja's sandbox."""
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except Exception as error:  # expressions of a template can raise anything
        raise UserError(f"the chat template cannot render these messages: {type(error).__name__}: {error}") from error


class Chat:
    """Render messages with a chat template and find the response in the tokens.

    The template writes the only BOS: tokens come from the rendered text with add_special_tokens=False. The response
    and the end token after it are trained. Text that the template writes after the end token is dropped.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, path: str | None = None) -> None:
        path = path or tokenizer.name_or_path
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

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tokenizer, without the template."""
        return hash_tokenizer(self.tokenizer)

    @cached_property
    def suffix(self) -> str:
        """The text that the template writes after an assistant's message."""
        user = {"role": "user", "content": PROBE}
        prompt = self.render([user])
        full = render_messages(self.tokenizer, [user, {"role": "assistant", "content": PROBE}], False)
        if not full.startswith(prompt) or PROBE not in full[len(prompt) :]:
            raise UserError(
                "the chat template's generation prompt is not a prefix of a rendered answer, so the response cannot be "
                f"separated from the prompt: it renders {prompt!r} and {full!r}. Set model.chat_template"
            )
        return full[full.rindex(PROBE) + len(PROBE) :]

    @cached_property
    def end_token(self) -> int:
        """The token that ends a response. It is trained, and sampling stops at it.

        It is the first special token that the template writes after the response (Llama 2's writes a space before it).
        """
        tokens = self._tokenize(self.suffix)["input_ids"] if self.suffix else []
        if not tokens:
            raise UserError(
                "the chat template writes nothing after an assistant's message, so the model would never learn to "
                "stop. Set model.chat_template to one that ends a message with the end-of-sequence token"
            )
        special = set(self.tokenizer.all_special_ids)
        return int(next((token for token in tokens if token in special), tokens[0]))

    @cached_property
    def tail(self) -> list[int]:
        """The tokens that the template writes after the end token. A reward model reads them too."""
        tokens = list(self._tokenize(self.suffix)["input_ids"])
        return tokens[tokens.index(self.end_token) + 1 :]

    def complete(self, ids: list[int]) -> list[int]:
        """Return the ids of `encode` with the end token and the tail, as a reward model reads them."""
        return [*ids, *([] if ids[-1] == self.end_token else [self.end_token]), *self.tail]

    def render(self, prompt: Sequence[Message]) -> str:
        """Return the prompt as text, up to the first character of the response."""
        return render_messages(self.tokenizer, prompt, add_generation_prompt=True)

    def prompt(self, prompt: Sequence[Message]) -> list[int]:
        """Return the prompt as tokens, up to the first token of the response."""
        return self._check_bos(list(self._tokenize(self.render(prompt))["input_ids"]))

    def encode(self, prompt: Sequence[Message], response: str, finished: bool = True) -> Encoded:
        """Return the tokens of a prompt and a response. An unfinished response has no end token.

        Raise a ValueError if the response cannot be located in the tokens.
        """
        rendered = self.render(prompt)
        full = render_messages(self.tokenizer, [*prompt, {"role": "assistant", "content": response}], False)
        if not (full.startswith(rendered) and full.endswith(self.suffix)):
            raise ValueError(f"the template renders the prompt differently once it is answered: {rendered[-40:]!r}")
        tokens = self._tokenize(full, return_offsets_mapping=True)
        ids, offsets = list(tokens["input_ids"]), list(tokens["offset_mapping"])
        begin, end = len(rendered), len(full) - len(self.suffix)
        start = next((t for t, (low, high) in enumerate(offsets) if high > begin), len(ids))
        prompt_ids = list(self._tokenize(rendered)["input_ids"])
        if ids[:start] != prompt_ids:  # not visible in the offsets if the tokenizer trims spaces
            # A token such as "\n    " spans the boundary. Tokenize both sides separately, as in sampling.
            rest = self._tokenize(full[begin:], return_offsets_mapping=True)
            ids, start = prompt_ids + list(rest["input_ids"]), len(prompt_ids)
            offsets = [(0, 0)] * start + [(low + begin, high + begin) for low, high in rest["offset_mapping"]]
            if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) != full:
                raise ValueError(
                    "one token spans the end of the prompt and the start of the response, and tokenizing them "
                    "separately changes the text"
                )
        after = [t for t, (_, high) in enumerate(offsets) if high > end and t >= start]
        stop = next((t for t in after if ids[t] == self.end_token), None)
        if stop is None:
            raise ValueError(
                f"the response's end token cannot be found in the rendered row. Its chat template is from {self.origin}"
            )
        if after[0] == start:
            raise ValueError("the response is empty after rendering by the template")
        return Encoded(ids=self._check_bos(ids[: stop + finished]), start=start)

    def _tokenize(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=False, **options)

    def _check_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if len(ids) > 1 and ids[0] == ids[1] == bos:
            raise ValueError(f"two BOS tokens ({self.tokenizer.bos_token}) at the start: the template writes both")
        return ids
