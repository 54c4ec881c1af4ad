"""Sample from an OpenAI-compatible server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from var.data.messages import Message
from var.sampling.base import Advance, Prompts, Sampling, Texts, derive_server_seed, ignore_progress
from var.utils.errors import Problems
from var.utils.http_client import Client, Failure, count_items, find_missing_text, get_text


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Sample from a server that has the reference, with one request and one seed per response.

    The server renders the messages itself. Nothing checks that its weights and chat template are those of `model=`;
    the local reference scores the responses as if they were its own. Replies are cached, so that a server that
    ignores seeds is still asked only once per response.

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
    ) -> Texts:
        """Return K texts per prompt, in order."""
        k = sampling.responses
        bodies = [self._body(prompt, draw, sampling) for prompt in prompts for draw in range(k)]
        replies = self.client.ask(
            bodies, advance=count_items(advance, k), find_fault=find_missing_text, version=self.version
        )
        problems = Problems(f"{self.client.base_url}: missing responses", shown=5)
        texts = []
        for i, reply in enumerate(replies):
            if isinstance(reply, Failure):
                problems.add(f"prompt {prompts[i // k][-1]['content'][:60]!r}", reply.reason)
            else:
                texts.append((get_text(reply) or "", reply["choices"][0].get("finish_reason") == "stop"))
        problems.check(
            f"{len(texts)} of {len(replies)} responses were received and cached. Run the same command to request only "
            "the missing ones."
        )
        return [texts[i : i + k] for i in range(0, len(texts), k)]

    def _body(self, prompt: Sequence[Message], draw: int, sampling: Sampling) -> dict[str, Any]:
        turns = [(message["role"], message["content"]) for message in prompt]
        body = {
            "messages": list(prompt), "temperature": sampling.temperature, "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens, "seed": derive_server_seed(sampling.seed, [turns, draw]),
        }  # fmt: skip
        return {key: value for key, value in {**body, **self.request}.items() if value is not None}

    def release(self) -> None:
        """Do nothing: the model is the server's."""
