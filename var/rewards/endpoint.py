"""A reward model behind HTTP: OpenRLHF's remote reward models, and vLLM's servers of reward models and classifiers."""

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from var.data.clock import CLOCK, read_date, set_clock
from var.data.messages import Message, render_message
from var.data.template import RENDERING, check_length
from var.data.template_file import read_template
from var.rewards.base import Answers, Prompts
from var.rewards.numbers import READER_VERSION, find_last_number
from var.utils.errors import Problems, UserError
from var.utils.http_client import Client, Failure
from var.utils.reasoning import UnfinishedReasoning, strip_reasoning
from var.utils.time_limit import time_limit

PATHS = {"query": "", "pooling": "/pooling", "classify": "/classify"}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Score a response with the raw score of a server.

    Each request has one response, so a score does not depend on its batch.

    Protocols:
        query: Send {"query": [prompt and response], "prompts": [prompt], "labels": [the row's answer]} to base_url,
            which replies {"rewards": [score]} (OpenRLHF's --remote_rm_url). The server adds BOS and end tokens. If the
            score is a text, as of a model that writes its rating, it is the last number after the reasoning.
        pooling, classify: Send the conversation as `messages` to vLLM's /pooling or /classify. The server renders them
            with its own chat template. The request has use_activation=false, so that the score is not squashed.
            Servers before vLLM 0.11 call this field `activation` or `softmax`.
    """

    client: Client
    protocol: Literal["query", "pooling", "classify"]
    chat_template: str | None = None  # plain, a .jinja file or a template; None: messages are joined by blank lines
    date: str | None = None  # YYYY-MM-DD, which the template reads from the clock; None: today's
    request: Mapping[str, Any] = field(default_factory=dict)  # further fields of the request body
    version: str = ""  # any text that distinguishes versions of the model: no server reports a hash of its weights
    key: str = field(default="reward", compare=False)  # where these settings are, for messages

    scores_text = True

    def __post_init__(self) -> None:
        if self.protocol not in PATHS:
            raise UserError(f"{self.key}.protocol: expected query, pooling or classify, got {self.protocol}")
        if self.chat_template is not None and self.protocol != "query":
            raise UserError(
                f"{self.key}.chat_template: has no effect with protocol={self.protocol}, where the server renders the "
                "messages. Start the server with its option --chat-template"
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The server, its model, and the settings. Raise a `UserError` if the package or the key is missing."""
        self.client.check()
        return {
            "program": "endpoint", **self.client.fingerprint, "protocol": self.protocol, "version": self.version,
            "request": dict(self.request), "chat_template": self._template,
            **({"reader": READER_VERSION} if self.protocol == "query" else {}),
            **({"date": self._today.isoformat()} if CLOCK in (self._template or "") else {}),
        }  # fmt: skip

    @cached_property
    def _template(self) -> str | None:
        return self.chat_template and read_template(self.chat_template, f"{self.key}.chat_template")

    @property
    def _today(self) -> datetime.date:
        return read_date(self.date, f"{self.key}.date")

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one score per response. Raise a `UserError` with all responses without a score."""
        bodies = [self._make_body(*triple) for triple in zip(prompts, responses, answers, strict=True)]
        replies = self.client.ask(bodies, PATHS[self.protocol], find_fault=self._find_fault, version=self.version)
        problems = Problems(f"{self.client.base_url}: responses without a score", shown=5)
        for text, reply in zip(responses, replies, strict=True):
            if isinstance(reply, Failure):
                problems.add(f"response {text[:60]!r}", reply.reason)
        problems.check(
            f"{len(replies) - len(problems.found)} of {len(replies)} scores are cached; the same command requests only "
            "the others."
        )
        return [self._read_score(reply) for reply in replies if not isinstance(reply, Failure)]

    def _make_body(self, prompt: Sequence[Message], response: str, answer: str | None) -> dict[str, Any]:
        messages = [*prompt, {"role": "assistant", "content": response}]
        if self.protocol != "query":
            return {"messages": messages, "use_activation": False, **self.request}
        query, question = self._render(messages, False), self._render(prompt, True)
        return {"query": [query], "prompts": [question], "labels": [answer or ""], **self.request}

    def _render(self, messages: Sequence[Any], add_generation_prompt: bool) -> str:
        if self._template is None:
            return "\n\n".join(render_message(message) for message in messages) + "\n\n" * add_generation_prompt
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with time_limit(RENDERING, "rendering"):
                set_clock(self._template, self._today)
                rendered = render_jinja_template(
                    conversations=[list(messages)], chat_template=self._template,
                    add_generation_prompt=add_generation_prompt, bos_token="", eos_token="",
                )  # fmt: skip
            text = check_length(str(rendered[0][0]))
        except Exception as error:  # expressions of a template can raise anything
            raise UserError(f"{self.key}.chat_template: {type(error).__name__}: {error}") from error
        return text

    def _find_fault(self, reply: dict[str, Any]) -> str | None:
        """Return why a reply has no valid score, else None."""
        try:
            self._read_score(reply)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            return f"{error if isinstance(error, ValueError) else 'no score'} in the reply {str(reply)[:120]}"
        return None

    def _read_score(self, reply: dict[str, Any]) -> float:
        """Return the only number of a reply, in reward units. vLLM nests it once or twice."""
        if self.protocol == "query":
            found = reply["rewards"]
        else:
            found = reply["data"][0]["data" if self.protocol == "pooling" else "probs"]
        while isinstance(found, list):
            if len(found) != 1:
                raise ValueError(f"{len(found)} numbers instead of one")
            found = found[0]
        if isinstance(found, str) and self.protocol == "query":
            found = _read_rating(found)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise TypeError(found)
        if not math.isfinite(found):
            raise ValueError("a score that is not finite")
        return float(found)


def _read_rating(text: str) -> float:
    """Return the last number of a text after its reasoning. Raise a ValueError if it has none."""
    try:
        number = find_last_number(strip_reasoning(text))
    except UnfinishedReasoning:
        raise ValueError("reasoning without an end") from None
    if number is None:
        raise ValueError("a text without a number")
    return float(number.value)
