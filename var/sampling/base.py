"""Settings of sampling, the protocol of a sampler, and what all samplers share."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from var.data.chat import Chat
from var.data.messages import Message
from var.utils.errors import UserError

Prompts = Sequence[Sequence[Message]]
Samples = Sequence[Sequence["Sample"]]  # per prompt K
Advance = Callable[[int], None]  # reports how many more prompts are done


def ignore_progress(done: int) -> None:
    """Report nothing."""


class Sample(NamedTuple):
    """One sampled response."""

    text: str  # without the end token, and without an incomplete last character; it may be empty
    finished: bool  # False: it was truncated
    ids: tuple[int, ...] | None = None  # the tokens as drawn, with the end token; None if the sampler returns only text

    def tokens(self, chat: Chat) -> list[int]:
        """Return its tokens; those of its text if it came as text, or from a model with another tokenizer."""
        if self.ids is not None and chat.wrote(self.text, self.finished, self.ids):
            return list(self.ids)
        return chat.tokenize_answer(self.text, self.finished)

    @property
    def record(self) -> dict[str, Any]:
        """The sample as JSON values, without ids if it came as text."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @classmethod
    def of(cls, chat: Chat, ids: Sequence[int]) -> "Sample":
        """Return the sample of drawn tokens."""
        return cls(chat.decode(ids), chat.is_finished(ids), tuple(ids))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled. At temperature 1 and top_p 1 they follow the policy itself, as the method assumes.

    The limits `batch` and `batch_tokens` are for speed and memory; they change the text at most by rounding. The K
    responses of a prompt always stay in one batch.

    Attributes:
        responses: K, responses per prompt.
        temperature: Divisor of the logits; 0 is greedy.
        top_p: Probability mass of the most likely tokens from which a token is drawn.
        max_new_tokens: Tokens at which a response is truncated; truncated responses are counted.
        batch: Sequences per batch, at most.
        batch_tokens: Maximum tokens per batch, with padding and max_new_tokens per sequence. One prompt may exceed it.
        seed: Seed of the random numbers; the same seed and prompt give the same text.
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
            raise UserError(
                "generate or eval.sampling: responses and max_new_tokens must be at least 1, batch at least responses."
            )
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError(
                "generate or eval.sampling: temperature must be at least 0 (0 is greedy) and top_p in (0, 1]."
            )
        if self.temperature == 0 and self.responses > 1:
            raise UserError(
                "generate or eval.sampling: at temperature=0 all responses of a prompt are equal. Set responses=1."
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings on which the text depends."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch", "batch_tokens")}

    def batches(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Divide prompts into batches, given their lengths in tokens in ascending order."""
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


class Sampler(Protocol):
    """Where responses come from. `reference` is a var.models.frozen.FrozenModel."""

    def fingerprint(self, reference: Any) -> dict[str, Any]:
        """Return what the text depends on, apart from the Sampling."""
        ...

    def check(self) -> None:
        """Raise a UserError if the sampler cannot run, before anything is sampled."""
        ...

    def __call__(
        self, reference: Any, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress
    ) -> Samples:
        """Return K samples per prompt, in order."""
        ...

    def release(self) -> None:
        """Free what was loaded for sampling. The next call loads it again."""
        ...


def derive_seed(seed: int, content: Any) -> int:
    """Return a seed that depends on `content` alone, so that a prompt gives the same text anywhere in a run."""
    return int.from_bytes(hashlib.sha256(repr((seed, content)).encode()).digest()[:6], "little")


def derive_server_seed(seed: int, content: Any) -> int:
    """Return `derive_seed` as a signed 32-bit integer, the type that servers read."""
    return derive_seed(seed, content) % 2**31
