"""Sample from an OpenAI-compatible server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from var.data.chat import Chat
from var.data.messages import Message, last_text, prompt_content
from var.sampling.base import Advance, Prompts, Sample, Samples, Sampling, derive_server_seed, ignore_progress
from var.utils.errors import Problems, UserError
from var.utils.http_client import Client, Failure, count_items, find_missing_text, get_text


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Sample from a server that has the reference, with one request and one seed per response.

    The server renders the messages itself. If it returns tokens (request={return_token_ids: true} for vLLM and SGLang),
    they are kept, and those of the prompt must be the local ones. Otherwise nothing checks that its chat template is
    that of `model=`. Nothing checks its weights: the local reference scores the responses as if they were its own.
    Replies are cached, so that a server that ignores seeds is still asked only once per response.

    Attributes:
        client: The server, with its cache of replies.
        request: Further fields of the request body, for example {top_k: -1} if the server's defaults change the
            distribution. A field that is null is removed.
        version: Any text that distinguishes one state of the server's model from another.
    """

    client: Client
    request: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def fingerprint(self, reference: Any) -> dict[str, Any]:
        """Return what the text depends on: address, model, request and version."""
        return {**self.client.fingerprint, "request": dict(self.request), "version": self.version}

    def check(self) -> None:
        """Raise a UserError if the client's package or key is missing."""
        self.client.check()

    def __call__(
        self, reference: Any, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress
    ) -> Samples:
        """Return K samples per prompt, in order."""
        k, chat = sampling.responses, reference.pretrained.chat
        bodies = [self._body(chat, prompt, draw, sampling) for prompt in prompts for draw in range(k)]
        replies = self.client.ask(
            bodies, advance=count_items(advance, k), find_fault=find_missing_text, version=self.version
        )
        problems = Problems(f"{self.client.base_url}: missing responses", shown=5)
        samples = []
        for i, reply in enumerate(replies):
            if isinstance(reply, Failure):
                problems.add(f"prompt {last_text(prompts[i // k])[:60]!r}", reply.reason)
            else:
                samples.append(self._read(chat, prompts[i // k], reply))
        problems.check(
            f"{len(samples)} of {len(replies)} responses were received and cached. Run the same command to request "
            "only the missing ones."
        )
        return [samples[i : i + k] for i in range(0, len(samples), k)]

    def _read(self, chat: Chat, prompt: Sequence[Message], reply: Mapping[str, Any]) -> Sample:
        """Return the sample in a reply, with its tokens if the server returns them."""
        choice = reply["choices"][0]
        finished, ids = choice.get("finish_reason") == "stop", choice.get("token_ids")
        read = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
        if read and list(read) != (own := chat.prompt(prompt)):
            raise UserError(
                f"{self.client.base_url}: the server reads a prompt as {len(read)} tokens and model= as {len(own)}: "
                f"{chat.template.decode(read)!r} and {chat.template.decode(own)!r}. Start it with the chat template "
                "and the tokenizer of model=."
            )
        if ids is None:
            return Sample(get_text(reply) or "", finished)
        return Sample.of(chat, [*ids, *[chat.end_token] * (finished and not chat.is_finished(ids))])

    def _body(self, chat: Chat, prompt: Sequence[Message], draw: int, sampling: Sampling) -> dict[str, Any]:
        body = {
            "messages": list(prompt), "temperature": sampling.temperature, "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": derive_server_seed(sampling.seed, [prompt_content(prompt), draw]),
            "tools": list(getattr(prompt, "tools", ())) or None,
            "chat_template_kwargs": {**chat.template.kwargs, **getattr(prompt, "template_kwargs", {})} or None,
        }  # fmt: skip
        return {key: value for key, value in {**body, **self.request}.items() if value is not None}

    def release(self) -> None:
        """Do nothing: the model is the server's."""
