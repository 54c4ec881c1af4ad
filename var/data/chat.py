"""Chat: messages to tokens and the span of the response, by the template's own offsets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from var.data.rows import Message
from var.utils.errors import UserError

PROBE = "probe"  # a response that every template renders unchanged


@dataclass(frozen=True)
class Encoded:
    """One prompt and one response as tokens: ids[:start] is the prompt, ids[start:] the response and its end token."""

    ids: list[int]
    start: int


def fingerprint(tokenizer: Any) -> str:
    """A hash of what a tokenizer does to text; padding and truncation are of the last call alone."""
    if not tokenizer.is_fast:  # of the words it knows
        return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:32]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {name: part for name, part in state.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def rendered(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Messages as the tokenizer's chat template writes them, in Jinja's sandbox."""
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except Exception as error:  # whatever the expressions of a template raise
        raise UserError(f"the chat template does not take these messages: {type(error).__name__}: {error}") from error


class Chat:
    """Renders messages by a chat template and finds the response in the tokens.

    Tokens come from the rendered text alone (add_special_tokens=False): the template writes the one BOS. What is
    trained is the response and the token that ends it; whatever the template writes after that token is left away.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if template is not None:
            tokenizer.chat_template = template
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "a base model's stands in its config: set model.chat_template"
            )
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} gives no offsets; a fast tokenizer is needed")
        self.tokenizer = tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokenizer, without the template."""
        return fingerprint(self.tokenizer)

    @cached_property
    def suffix(self) -> str:
        """What the template writes after an assistant's message."""
        user = {"role": "user", "content": PROBE}
        opened = self.render([user])
        closed = self._template([user, {"role": "assistant", "content": PROBE}], add_generation_prompt=False)
        if not closed.startswith(opened) or PROBE not in closed[len(opened) :]:
            raise UserError(
                "the chat template's generation prompt is no prefix of a rendered answer, so the response cannot be "
                f"told from the prompt: it renders {opened!r} and {closed!r}. Set model.chat_template"
            )
        return closed[closed.rindex(PROBE) + len(PROBE) :]

    @cached_property
    def end_token(self) -> int:
        """The token that ends a response: trained, and where sampling stops.

        The first special token that the template writes after the response (Llama 2's writes a space before it).
        """
        tokens = self._tokens(self.suffix)["input_ids"] if self.suffix else []
        if not tokens:
            raise UserError(
                "the chat template writes nothing after an assistant's message, so the model would never learn to "
                "stop; set model.chat_template to one that ends it with the end-of-sequence token"
            )
        special = set(self.tokenizer.all_special_ids)
        return int(next((token for token in tokens if token in special), tokens[0]))

    @cached_property
    def tail(self) -> list[int]:
        """The tokens that the template writes after the end token; a reward model reads them too."""
        tokens = list(self._tokens(self.suffix)["input_ids"])
        return tokens[tokens.index(self.end_token) + 1 :]

    def closed(self, ids: list[int]) -> list[int]:
        """The tokens of a whole rendered row, of `encode`'s ids: the form that a reward model scores."""
        return [*ids, *([] if ids[-1] == self.end_token else [self.end_token]), *self.tail]

    def render(self, prompt: Sequence[Message]) -> str:
        """The prompt as text, up to where the response begins."""
        return self._template(prompt, add_generation_prompt=True)

    def prompt(self, prompt: Sequence[Message]) -> list[int]:
        """The prompt as tokens, up to where the response begins."""
        return self._one_bos(list(self._tokens(self.render(prompt))["input_ids"]))

    def encode(self, prompt: Sequence[Message], response: str, finished: bool = True) -> Encoded:
        """Prompt and response as tokens; an unfinished response is left without its end token.

        A ValueError says why a row has no clean response span.
        """
        opened = self.render(prompt)
        full = self._template([*prompt, {"role": "assistant", "content": response}], add_generation_prompt=False)
        if not (full.startswith(opened) and full.endswith(self.suffix)):
            raise ValueError(f"the template renders the prompt differently once it is answered: {opened[-40:]!r}")
        tokens = self._tokens(full, return_offsets_mapping=True)
        ids, offsets = list(tokens["input_ids"]), list(tokens["offset_mapping"])
        begin, end = len(opened), len(full) - len(self.suffix)
        start = next((t for t, (low, high) in enumerate(offsets) if high > begin), len(ids))
        before = list(self._tokens(opened)["input_ids"])
        if ids[:start] != before:  # offsets alone miss it where spaces are trimmed
            # one token spans the end of the prompt and the begin of the response, as "\n" and "    return": apart, as
            # the policy has them when it answers
            rest = self._tokens(full[begin:], return_offsets_mapping=True)
            ids, start = before + list(rest["input_ids"]), len(before)
            offsets = [(0, 0)] * start + [(low + begin, high + begin) for low, high in rest["offset_mapping"]]
            if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) != full:
                raise ValueError(
                    "one token spans the end of the prompt and the begin of the response, and apart they are another "
                    "text"
                )
        after = [t for t, (_, high) in enumerate(offsets) if high > end and t >= start]
        stop = next((t for t in after if ids[t] == self.end_token), None)
        if stop is None:
            raise ValueError("the response's end token cannot be found in the rendered row")
        if after[0] == start:
            raise ValueError("the response is empty once the template has rendered it")
        return Encoded(ids=self._one_bos(ids[: stop + finished]), start=start)

    def _template(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return rendered(self.tokenizer, messages, add_generation_prompt)

    def _tokens(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=False, **options)

    def _one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if len(ids) > 1 and ids[0] == ids[1] == bos:
            raise ValueError(f"two BOS tokens ({self.tokenizer.bos_token}) at the start: the template writes one twice")
        return ids
