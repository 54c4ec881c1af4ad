"""A reward model behind HTTP: OpenRLHF's remote reward models, and vLLM's servers of reward models and classifiers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from var.data.rows import Message
from var.utils.errors import Problems, UserError
from var.utils.http_client import Client, Failure

PATHS = {"query": "", "pooling": "/pooling", "classify": "/classify"}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The raw score that a server gives, one response a request, so that a score depends on nothing else.

    protocol: query: {"query": [prompt and response], "prompts": [prompt], "labels": [the row's answer]} to base_url
    itself, which replies {"rewards": [score]} (OpenRLHF's --remote_rm_url); pooling and classify: the conversation as
    `messages` to vLLM's /pooling or /classify. chat_template: Jinja that writes the texts of `query`; null: messages
    joined by blank lines, and the response after another one; pooling and classify use the server's own template.
    The texts' BOS and end-of-sequence tokens are the server's. request: further fields of the body; vLLM squashes a
    score unless it is told `use_activation: false`, as it is here, which servers before 0.11 call `activation` and
    `softmax`. version: any text that tells one state of the server's model from another: no server says a hash of its
    weights.
    """

    client: Client
    protocol: Literal["query", "pooling", "classify"]
    chat_template: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    scores_text = True

    def __post_init__(self) -> None:
        if self.protocol not in PATHS:
            raise UserError(f"reward.protocol is query, pooling or classify, got {self.protocol}")
        if self.chat_template is not None and self.protocol != "query":
            raise UserError(
                f"reward.chat_template is of protocol=query; with protocol={self.protocol} the server renders the "
                "messages, by its own option --chat-template"
            )

    @property
    def identity(self) -> dict[str, Any]:
        self.client.check()  # a missing package or key is told before anything is sampled
        return {
            "program": "endpoint", **self.client.identity, "protocol": self.protocol, "version": self.version,
            "request": dict(self.request), "chat_template": self.chat_template,
        }  # fmt: skip

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        bodies = [self._body(*triple) for triple in zip(prompts, responses, answers, strict=True)]
        replies = self.client.ask(bodies, path=PATHS[self.protocol], find_fault=self._unscored, version=self.version)
        problems = Problems(f"{self.client.base_url} left responses without a score", shown=5)
        for text, reply in zip(responses, replies, strict=True):
            if isinstance(reply, Failure):
                problems.add(f"response {text[:60]!r}", reply.reason)
        problems.check(
            f"{len(replies) - len(problems.found)} of {len(replies)} have one, which is kept: the same command asks "
            "only for the rest."
        )
        return [self._score(reply) for reply in replies if not isinstance(reply, Failure)]

    def _body(self, prompt: Sequence[Message], response: str, answer: str | None) -> dict[str, Any]:
        whole = [*prompt, {"role": "assistant", "content": response}]
        if self.protocol != "query":
            return {"messages": whole, "use_activation": False, **self.request}
        texts = {"query": [self._text(whole, False)], "prompts": [self._text(prompt, True)], "labels": [answer or ""]}
        return {**texts, **self.request}

    def _text(self, messages: Sequence[Any], open_ended: bool) -> str:
        if self.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n" * open_ended
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered = render_jinja_template(
                conversations=[list(messages)], chat_template=self.chat_template, add_generation_prompt=open_ended,
                bos_token="", eos_token="",
            )  # fmt: skip
        except Exception as error:  # whatever the expressions of a template raise
            raise UserError(f"reward.chat_template: {type(error).__name__}: {error}") from error
        return str(rendered[0][0])

    def _unscored(self, reply: dict[str, Any]) -> str | None:
        try:
            self._score(reply)
        except (LookupError, TypeError, ValueError) as error:
            return f"{error if isinstance(error, ValueError) else 'no score'} in the reply {str(reply)[:120]}"
        return None

    def _score(self, reply: dict[str, Any]) -> float:
        """The one number of a reply, in reward units; vLLM nests it once or twice."""
        if self.protocol == "query":
            found = reply["rewards"]
        else:
            found = reply["data"][0]["data" if self.protocol == "pooling" else "probs"]
        while isinstance(found, list):
            if len(found) != 1:
                raise ValueError(f"{len(found)} numbers where a reward model has one")
            found = found[0]
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise TypeError(found)
        if not math.isfinite(found):
            raise ValueError("a score that is not finite")
        return float(found)
