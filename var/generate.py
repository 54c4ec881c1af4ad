"""Sampling: K responses a prompt from a policy, as text and as they stopped; the same seeds give the same text."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from var.data.chat import Chat
from var.data.rows import Message
from var.logprobs import attention
from var.problems import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled. temperature 1 and top_p 1 draw from the policy itself, as the method assumes.

    responses: K a prompt. max_new_tokens: a response that reaches it is cut, which is counted. batch: sequences at
    once; it changes speed and, as the seed is drawn per batch, the text.
    """

    responses: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch: int
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
        return asdict(self)


def sample(
    model: Any,
    chat: Chat,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[tuple[str, bool]]]:
    """K (text, finished) for each prompt, in order, the text without the end token; it may be empty."""
    encoded = [chat.prompt(prompt) for prompt in prompts]
    return [
        [(chat.tokenizer.decode(ids, skip_special_tokens=True), finished) for ids, finished in several]
        for several in sample_tokens(model, chat, encoded, sampling, advance)
    ]


@torch.inference_mode()
def sample_tokens(
    model: Any,
    chat: Chat,
    encoded: Sequence[list[int]],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[tuple[list[int], bool]]]:
    """K (tokens, finished) for each encoded prompt, in order, without the end token.

    Prompts are batched by length, so little is padded; padding stands on the left, by transformers' own masks.
    """
    tokenizer, k = chat.tokenizer, sampling.responses
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), encoded[i]))
    responses: list[list[tuple[list[int], bool]]] = [[] for _ in encoded]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else chat.end_token
    device = model.device
    step = sampling.batch // k
    training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    options: dict[str, Any] = {"do_sample": False} if sampling.temperature == 0 else {
        "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0,
    }  # fmt: skip
    with attention(model, "sdpa"), _own_settings(model), torch.random.fork_rng(devices):
        for begin in range(0, len(order), step):
            batch = order[begin : begin + step]
            width = max(len(encoded[i]) for i in batch)
            rows = [[pad] * (width - len(encoded[i])) + encoded[i] for i in batch]
            mask = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch]
            torch.manual_seed(_seed(sampling.seed, [encoded[i] for i in batch]))
            out = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                num_return_sequences=k,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=chat.end_token,
                pad_token_id=pad,
                **options,
            )[:, width:].tolist()
            for at, i in enumerate(batch):
                for row in out[at * k : (at + 1) * k]:
                    finished = chat.end_token in row
                    responses[i].append((row[: row.index(chat.end_token)] if finished else row, finished))
            advance(len(batch))
    model.train(training)
    return responses


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Within, the model's generation_config counts for nothing: a repetition penalty would draw from another policy."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _seed(seed: int, batch: list[list[int]]) -> int:
    """Of the batch's content: the same prompts draw the same text, wherever in the run they are sampled."""
    return int.from_bytes(hashlib.sha256(repr((seed, batch)).encode()).digest()[:6], "little")
