"""Sample from a model in this process.

This loop replaces transformers' generate, so that a prompt gives the same text whatever else is in its batch, and so
that the settings in a model's generation config do not change the distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from var.data.chat import Chat
from var.models.attention import use_attention
from var.models.lora import adapter_off
from var.sampling.base import Advance, Prompts, Sampling, Texts, decode, derive_seed, ignore_progress


def sample(model: Any, chat: Chat, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress) -> Texts:
    """Return K texts per prompt, in order. A text may be empty; one that is not finished was truncated."""
    encoded = [chat.prompt(prompt) for prompt in prompts]
    return [
        [(decode(chat, ids), finished) for ids, finished in responses]
        for responses in sample_tokens(model, chat, encoded, sampling, advance)
    ]


@torch.no_grad()  # FSDP keeps tensors between runs, and inference mode would make them unfit for training
def sample_tokens(
    model: Any, chat: Chat, encoded: Sequence[list[int]], sampling: Sampling, advance: Advance = ignore_progress
) -> list[list[tuple[list[int], bool]]]:
    """Return K (tokens, finished) per encoded prompt, in order, without the end token.

    Prompts are batched by length to limit padding. Each is encoded once for its K responses, and a finished response
    leaves the batch. The random numbers of a response depend on seed, prompt and its number among the K, so other
    responses in the batch change its text at most by rounding.
    """
    k = sampling.responses
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), encoded[i]))
    responses: list[list[tuple[list[int], bool]]] = [[] for _ in encoded]
    training = model.training
    model.eval()
    with use_attention(model, "sdpa"):
        for members in sampling.batches([len(encoded[i]) for i in order]):
            batch = order[members]
            sampled = _generate(model, [encoded[i] for i in batch], sampling, chat.end_token)
            for i, first in zip(batch, range(0, len(sampled), k), strict=True):
                responses[i] = sampled[first : first + k]
            advance(len(batch))
    model.train(training)
    return responses


def _generate(model: Any, prompts: list[list[int]], sampling: Sampling, end: int) -> list[tuple[list[int], bool]]:
    """Return K (tokens, finished) per prompt, prompt by prompt, from one batch that is padded on the left."""
    k, steps, width, device = sampling.responses, sampling.max_new_tokens, max(map(len, prompts)), model.device
    numbers = [np.random.default_rng(derive_seed(sampling.seed, prompt)).random((k, steps)) for prompt in prompts]
    draws = torch.from_numpy(np.concatenate(numbers)).to(device)  # [B·K, steps] float64
    weight = model.get_output_embeddings().weight
    head = weight.to(torch.promote_types(weight.dtype, torch.float32))  # as for log-probabilities
    cache = DynamicCache(config=model.config)

    def next_logits(tokens: Tensor, mask: Tensor) -> Tensor:
        """Return [rows, V] after the last of the new `tokens` [rows, n]; `mask` covers the cached tokens as well."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
        with torch.autocast(device.type, enabled=False):
            return torch.nn.functional.linear(out.last_hidden_state[:, -1].to(head.dtype), head)

    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    padded = torch.tensor([[end] * (width - len(ids)) + ids for ids in prompts], device=device)
    logits = next_logits(padded, mask).repeat_interleave(k, 0)
    cache.batch_repeat_interleave(k)
    mask, active = mask.repeat_interleave(k, 0), torch.arange(len(prompts) * k, device=device)
    responses: list[list[int]] = [[] for _ in active]
    finished = [False] * len(active)
    for step in range(steps):
        tokens = choose_tokens(logits, draws[active, step], sampling)
        for row, token in zip(active.tolist(), tokens.tolist(), strict=True):
            if token == end:
                finished[row] = True
            else:
                responses[row].append(token)
        if (tokens == end).any():
            rows = (tokens != end).nonzero()[:, 0]
            tokens, mask, active = tokens[rows], mask[rows], active[rows]
            cache.batch_select_indices(rows)
        if not len(active) or step + 1 == steps:
            break
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        logits = next_logits(tokens[:, None], mask)
    return list(zip(responses, finished, strict=True))


def choose_tokens(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Return [rows] tokens: where the cumulative probability of logits [rows, V] exceeds draws [rows] in [0, 1).

    The sum is in float64: in float32, rounding over a large vocabulary would change the probability of the last tokens.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    tokens = None
    if sampling.top_p < 1:
        probabilities, tokens = probabilities.sort(dim=-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < sampling.top_p, 0.0)
    sums = probabilities.cumsum(-1)
    index = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return (index if tokens is None else tokens.gather(-1, index))[:, 0]


@dataclass(frozen=True, kw_only=True)
class Transformers:
    """Sample from the reference itself, in the arithmetic in which it scores."""

    def fingerprint(self, reference: Any) -> dict[str, Any]:
        """Return what the text depends on."""
        return {"reference": reference.fingerprint, "version": 2}

    def check(self) -> None:
        """Do nothing: this sampler always runs."""

    def __call__(
        self, reference: Any, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress
    ) -> Texts:
        """Return K texts per prompt, in order."""
        model = reference.policy.model
        with reference.precision(), adapter_off(model):
            return sample(model, reference.pretrained.chat, prompts, sampling, advance)

    def release(self) -> None:
        """Do nothing: the reference releases its own model."""
