"""Sample from an OpenAI-compatible server."""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from var.data.chat import Chat
from var.data.messages import Message, last_text, prompt_content
from var.sampling.base import Advance, Prompts, Sample, Samples, Sampling, derive_server_seed, ignore_progress
from var.utils.completions import count_tokens, find_missing_text, get_text
from var.utils.console import warn
from var.utils.errors import Problems, UserError
from var.utils.http_client import Client, Failure, count_items

ENDED = {"stop", "eos_token", "tool_calls", "function_call"}  # values of finish_reason of complete answers


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Sample from a server that has the reference, with one request and one seed per response.

    The server renders the messages itself. If it returns tokens (request={return_token_ids: true} for vLLM and SGLang),
    they are kept, and those of the prompt must be the local ones. Otherwise only the number of prompt tokens is
    compared. Nothing checks its weights: the local reference scores the responses as if they were its own. Replies are
    cached, so that a server that ignores seeds is still asked only once per response.

    Attributes:
        client: The server, with its cache of replies.
        request: Further fields of the request body, for example {top_k: -1} if the server's defaults change the
            distribution. A field that is null is removed, and the object generation_config is sent as JSON text.
        version: Any text that distinguishes one state of the server from another.
    """

    client: Client
    request: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def fingerprint(self, reference: Any) -> dict[str, Any]:
        """Return what the text depends on: address, model, request, version, and arguments of the template."""
        own = {**self.client.fingerprint, "request": dict(self.request), "version": self.version}
        kwargs = reference.pretrained.chat.template.kwargs
        return {**own, "chat_template_kwargs": kwargs} if kwargs else own  # without any, earlier entries stay valid

    def check(self) -> None:
        """Raise a UserError if the client's package or key is missing."""
        self.client.check()

    def __call__(
        self, reference: Any, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress
    ) -> Samples:
        """Return K samples per prompt, in order."""
        k, chat = sampling.responses, reference.pretrained.chat
        own = [chat.prompt(prompt) for prompt in prompts]
        known = set(map(tuple, own))

        def find_fault(reply: Mapping[str, Any]) -> str | None:
            if fault := _find_malformed(reply):
                return fault
            self._check(chat, known, reply)  # before the reply is cached: all others will have the same fault
            return _find_fault(reply)

        bodies = [self._body(chat, prompt, draw, sampling) for prompt in prompts for draw in range(k)]
        replies = self.client.ask(bodies, advance=count_items(advance, k), find_fault=find_fault, version=self.version)
        problems = Problems(f"{self.client.base_url}: missing responses", shown=5)
        samples, lengths = list[Sample](), list[tuple[int, int]]()
        for i, reply in enumerate(replies):
            if isinstance(reply, Failure):
                problems.add(f"prompt {last_text(prompts[i // k])[:60]!r}", reply.reason)
                continue
            self._check(chat, {tuple(own[i // k])}, reply)  # a cached reply, if the local template has changed
            samples.append(_read(chat, reply))
            lengths.append((count_tokens(reply, "prompt_tokens"), len(own[i // k])))
        problems.check(
            f"{len(samples)} of {len(replies)} responses were received and cached. Run the same command to request "
            "only the missing ones."
        )
        self._compare(lengths)
        return [samples[i : i + k] for i in range(0, len(samples), k)]

    def _check(self, chat: Chat, known: Set[tuple[int, ...]], reply: Mapping[str, Any]) -> None:
        """Raise a UserError if a reply shows that its text would train wrongly, because of how the server is set up."""
        choice = _get_choice(reply)
        url, ids = self.client.base_url, choice.get("token_ids")
        read = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
        if read and tuple(read) not in known:
            nearest = max(
                known, key=lambda prompt: _count_common(prompt, read) + _count_common(prompt[::-1], read[::-1])
            )
            theirs, ours = _decode(chat, read), _decode(chat, nearest)
            cause = (
                "The text is the same, so it contains control tokens, which the server reads as such. Remove its row."
                if theirs == ours
                else "Start it with the chat template and the tokenizer of model=, and set sampler.version to a new "
                "value so that it is asked again."
            )
            raise UserError(
                f"{url}: the server reads a prompt as {len(read)} tokens and model= as {len(nearest)}: "
                f"{theirs!r} and {ours!r}. {cause}"
            )
        if ids is not None:
            if any(not 0 <= token < len(chat.tokenizer) for token in ids):
                raise UserError(f"{url}: its token_ids are not those of the tokenizer of model=: {list(ids)[:8]}, ….")
            return
        message, missing = choice.get("message") or {}, list[str]()
        for name in ("reasoning_content", "reasoning", "tool_calls"):
            value = message.get(name)
            if value and not (isinstance(value, str) and value.strip() in (message.get("content") or "")):
                missing.append(name)
        if missing:
            raise UserError(
                f"{url}: the server moved part of what the model wrote from the text into {' and '.join(missing)}, so "
                "the answer would train without it. Let it return tokens (sampler.request={return_token_ids: true} for "
                "vLLM and SGLang), or turn its parser off: see the table of servers in docs/sampling.md."
            )

    def _compare(self, lengths: Sequence[tuple[int, int]]) -> None:
        """Warn if the server counts other numbers of prompt tokens than the local template writes."""
        counted = [(theirs, ours) for theirs, ours in lengths if theirs]
        different = [pair for pair in counted if pair[0] != pair[1]]
        if different:
            theirs, ours = different[0]
            warn(
                f"{self.client.base_url}: in {len(different)} of {len(counted)} replies the prompt has another number "
                f"of tokens than with model= ({theirs} and {ours} in the first), so the server may use another chat "
                "template, or drop keys of messages. Its responses are then no samples of the reference."
            )

    def _body(self, chat: Chat, prompt: Sequence[Message], draw: int, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "messages": list(prompt), "temperature": sampling.temperature, "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": derive_server_seed(sampling.seed, [prompt_content(prompt), draw]),
            "tools": list(getattr(prompt, "tools", ())) or None,
            "chat_template_kwargs": {**chat.template.kwargs, **getattr(prompt, "template_kwargs", {})} or None,
        }  # fmt: skip
        body |= self.request
        if isinstance(config := body.get("generation_config"), Mapping):
            body["generation_config"] = json.dumps(config)  # the form in which transformers serve reads it
        return {key: value for key, value in body.items() if value is not None}

    def release(self) -> None:
        """Do nothing: the model is the server's."""


def _get_choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = reply.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}


def _find_malformed(reply: Mapping[str, Any]) -> str | None:
    """Return which part of a reply has another type than the protocol says, or None. A part may be missing."""
    choice = _get_choice(reply)
    for where in (choice, reply):
        for name in ("token_ids", "prompt_token_ids"):
            ids = where.get(name)
            if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
                return f"{name} is not a list of integers in the reply {str(reply)[:120]}"
    message = choice.get("message") or {}
    if not isinstance(message, Mapping) or not isinstance(message.get("content") or "", str):
        return f"no text in the reply {str(reply)[:120]}"
    return None


def _find_fault(reply: Mapping[str, Any]) -> str | None:
    """Return why a reply has no response, or None."""
    choice = _get_choice(reply)
    if choice.get("token_ids") is None and (fault := find_missing_text(reply)):
        return fault
    reason = choice.get("finish_reason")
    if reason in ENDED or reason == "length":
        return None
    return f"finish_reason={reason!r} does not say whether the response is complete (stop) or truncated (length)"


def _read(chat: Chat, reply: Mapping[str, Any]) -> Sample:
    """Return the sample in a reply, with its tokens if the server returns them."""
    choice = _get_choice(reply)
    finished, ids = choice.get("finish_reason") in ENDED, choice.get("token_ids")
    if ids is None:
        return Sample(get_text(reply) or "", finished)
    return Sample.of(chat, [*ids, *[chat.end_token] * (finished and not chat.is_finished(ids))])


def _count_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _decode(chat: Chat, ids: Sequence[int]) -> str:
    return chat.template.decode([token for token in ids if 0 <= token < len(chat.tokenizer)])
