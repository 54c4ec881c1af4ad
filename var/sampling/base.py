"""Sampling: K responses a prompt from a policy, as text and as they stopped; the same seeds give the same text."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from var.data.chat import Chat
from var.data.rows import Message
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled. temperature 1 and top_p 1 draw from the policy itself, as the method assumes.

    responses: K a prompt. max_new_tokens: a response that reaches it is cut, which is counted. batch, batch_tokens:
    sequences, and their tokens with padding, at once at most, but for one prompt's K, which stay together; for speed
    and memory, the text depends on them by rounding alone.
    """

    responses: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch: int
    batch_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.responses < 1 or self.max_new_tokens < 1 or self.batch < self.responses:
            raise UserError("generate: responses and max_new_tokens are at least 1, batch at least responses")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError("generate: temperature is ≥ 0 (0 is greedy) and top_p in (0, 1]")
        if self.temperature == 0 and self.responses > 1:
            raise UserError("generate: at temperature 0 all responses of a prompt are one; set responses to 1")

    @property
    def identity(self) -> dict[str, Any]:
        """What the text depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch", "batch_tokens")}

    def batches(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Neighbours among prompts of so many tokens, in ascending order, that are answered at once."""
        begin = 0
        for end, length in enumerate(lengths, 1):
            sequences = (end - begin) * self.responses
            if end - begin > 1 and (
                sequences > self.batch or sequences * (length + self.max_new_tokens) > self.batch_tokens
            ):
                yield slice(begin, end - 1)
                begin = end - 1
        if begin < len(lengths):
            yield slice(begin, len(lengths))


def _seed(seed: int, content: Any) -> int:
    """Of the content: the same prompt draws the same text, wherever in the run it is sampled."""
    return int.from_bytes(hashlib.sha256(repr((seed, content)).encode()).digest()[:6], "little")


class Sampler(Protocol):
    """Where the reference's responses come from. `reference` is var.models.frozen.Reference."""

    def identity(self, reference: Any) -> dict[str, Any]:
        """What its text depends on, beside the sampling."""
        ...

    def check(self) -> None:
        """What the user can mend, before anything is sampled."""
        ...

    def __call__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[tuple[str, bool]]]:
        """K (text, finished) for each prompt, in order, the text without the end token; it may be empty."""
        ...

    def release(self) -> None:
        """Let go of what was loaded for it; the next call loads it again."""
        ...


def decode(chat: Chat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids, skip_special_tokens=True))


def _short(seed: int) -> int:
    """Servers read a seed as a signed number of 32 bits."""
    return seed % 2**31
