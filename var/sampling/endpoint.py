"""Sample from a server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from var.data.rows import Message
from var.sampling.base import Sampling, _seed, _short
from var.utils.errors import Problems
from var.utils.http_client import Client, Failure, count_items, find_missing_text, get_text


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server that has the reference, asked for one response a request, each with a seed of its own.

    The server renders the messages itself, and nobody checks that its weights and template are those of `model=`: the
    responses are scored by the local reference as if they were its own. request: further fields of the body, as
    {top_k: -1} where the server's defaults bend the draws; one that is null is left out. version: any text that tells
    one state of the server's model from another. A server without seeds gives other texts to the same seed, but what
    it gave once is kept.
    """

    client: Client
    request: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def identity(self, reference: Any) -> dict[str, Any]:
        return {**self.client.identity, "request": dict(self.request), "version": self.version}

    def check(self) -> None:
        self.client.check()

    def __call__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[tuple[str, bool]]]:
        k = sampling.responses
        bodies = [self._body(prompt, draw, sampling) for prompt in prompts for draw in range(k)]
        replies = self.client.ask(
            bodies, advance=count_items(advance, k), find_fault=find_missing_text, version=self.version
        )
        problems = Problems(f"{self.client.base_url} left responses out", shown=5)
        for at, reply in enumerate(replies):
            if isinstance(reply, Failure):
                problems.add(f"prompt {prompts[at // k][-1]['content'][:60]!r}", reply.reason)
        problems.check(
            f"{len(replies) - len(problems.found)} of {len(replies)} came and are kept: the same command asks only "
            "for the rest."
        )
        came = [reply for reply in replies if not isinstance(reply, Failure)]
        texts = [(get_text(reply) or "", reply["choices"][0].get("finish_reason") == "stop") for reply in came]
        return [texts[at : at + k] for at in range(0, len(texts), k)]

    def _body(self, prompt: Sequence[Message], draw: int, sampling: Sampling) -> dict[str, Any]:
        turns = [(message["role"], message["content"]) for message in prompt]
        body = {
            "messages": list(prompt), "temperature": sampling.temperature, "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens, "seed": _short(_seed(sampling.seed, [turns, draw])),
        }  # fmt: skip
        return {key: value for key, value in {**body, **self.request}.items() if value is not None}

    def release(self) -> None:
        pass
