"""Sample from a model in this process.

This loop replaces transformers' generate, so that a prompt gives the same text whatever else is in its batch, and so
that the settings in a model's generation config do not change the distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from var.data.chat import Chat
from var.models.attention import use_attention
from var.models.logprobs import choose_head_dtype, copy_to, multiply
from var.models.lora import adapter_off
from var.sampling.base import Advance, Prompts, Sample, Samples, Sampling, derive_seed, ignore_progress
from var.sampling.kv_cache import count_rows, free_memory, make_cache, reserve
from var.utils.console import warn
from var.utils.errors import UserError

CACHE_NAMES = ("cache", "past_key_values")  # of a model's argument: in recent versions of transformers, and before

# Tokens between two checks for finished responses, by type of device. At a check the host waits for the device, which
# costs nothing on a CPU. Between checks, finished responses are continued for nothing.
CHECK_EVERY = {"cpu": 1, "default": 16}


def sample(model: Any, chat: Chat, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress) -> Samples:
    """Return K samples per prompt, in order."""
    encoded = [chat.prompt(prompt) for prompt in prompts]
    tokens = sample_tokens(model, chat, encoded, sampling, advance)
    return [[Sample.of(chat, ids) for ids in responses] for responses in tokens]


@torch.no_grad()  # FSDP keeps tensors between runs, and inference mode would make them unfit for training
def sample_tokens(
    model: Any, chat: Chat, encoded: Sequence[list[int]], sampling: Sampling, advance: Advance = ignore_progress
) -> list[list[list[int]]]:
    """Return the tokens of K responses per encoded prompt, in order. Those of a finished one include its end token.

    Prompts are batched by length to limit padding. Each is encoded once for its K responses, and finished responses
    leave the batch. The random numbers of a response depend on seed, prompt and its number among the K, so other
    responses in the batch change its text at most by rounding. On a GPU, a batch is limited by the free memory as
    well, and divided if that is not enough.
    """
    k, device = sampling.responses, model.device
    pending = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), encoded[i]))
    responses: list[list[list[int]]] = [[] for _ in encoded]
    training = model.training
    model.eval()
    with use_attention(model, "sdpa"):
        while pending:
            lengths = [len(encoded[i]) for i in pending[: sampling.batch // k + 1]]
            size = next(sampling.batches(lengths)).stop
            longest = lengths[size - 1] + sampling.max_new_tokens
            if (memory := free_memory(device)) < float("inf"):
                size = max(1, min(size, count_rows(model.config, model.dtype.itemsize, longest, memory) // k))
            batch = pending[:size]
            try:
                sampled = _generate(model, [encoded[i] for i in batch], sampling, sorted(chat.end_tokens))
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise UserError(
                        f"generate or eval.sampling: responses={k} of {longest} tokens do not fit into the memory of "
                        f"{device}. Lower responses or max_new_tokens."
                    ) from error
                sampling = replace(sampling, batch=size // 2 * k)
            else:
                for i, first in zip(batch, range(0, len(sampled), k), strict=True):
                    responses[i] = sampled[first : first + k]
                advance(size)
                pending = pending[size:]
                continue
            # after the except block, which still refers to the tensors
            warn(f"sampling: {size * k} sequences do not fit into the memory of {device}; trying {sampling.batch}")
            torch.cuda.empty_cache()
    model.train(training)
    return responses


def _generate(model: Any, prompts: list[list[int]], sampling: Sampling, ends: list[int]) -> list[list[int]]:
    """Return the tokens of K responses per prompt, prompt by prompt, from one batch that is padded on the left."""
    k, steps, width, device = sampling.responses, sampling.max_new_tokens, max(map(len, prompts)), model.device
    numbers = [np.random.default_rng(derive_seed(sampling.seed, prompt)).random((k, steps)) for prompt in prompts]
    draws = torch.from_numpy(np.concatenate(numbers)).to(device)  # [B·K, steps] float64
    weight = model.get_output_embeddings().weight
    head = weight.to(choose_head_dtype(device, weight.dtype))  # as for log-probabilities
    cache = make_cache()

    def next_logits(tokens: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Return [rows, V] after the last of the new `tokens` [rows, n], in float32 or better."""
        hidden = compute_last_hidden_states(model, tokens, mask, positions, cache)
        return multiply(hidden[:, -1].to(head.dtype), head.T)

    padding = [width - len(ids) for ids in prompts]
    valid = torch.tensor([[0] * n + [1] * (width - n + steps) for n in padding], device=device)  # [B, width + steps]
    padded = torch.tensor([ends[:1] * n + ids for n, ids in zip(padding, prompts, strict=True)], device=device)
    mask = make_mask(model.config, valid[:, :width], width, steps) if any(padding) else None
    positions = (valid[:, :width].cumsum(1) - 1).clamp(min=0)
    logits = next_logits(padded, mask, positions).repeat_interleave(k, 0)
    reserve(cache, k, steps - 1)
    valid, position = valid.repeat_interleave(k, 0), positions[:, -1:].repeat_interleave(k, 0)
    active = list(range(len(prompts) * k))
    rows = torch.arange(len(active), device=device)
    found = torch.full((len(active), steps), ends[0], device=device)
    stop = torch.tensor(ends, device=device)
    every = CHECK_EVERY.get(device.type, CHECK_EVERY["default"])
    for step in range(steps):
        tokens = choose_tokens(logits, draws[rows, step], sampling)
        found[rows, step] = tokens
        if step + 1 == steps:
            break
        if (step + 1) % every == 0:
            unfinished = (found[rows, step + 1 - every : step + 1, None] != stop).all(2).all(1).tolist()
            if not all(unfinished):
                kept = [i for i, more in enumerate(unfinished) if more]
                if not kept:
                    break
                index, active = copy_to(kept, device), [active[i] for i in kept]
                tokens, valid, position, rows = tokens[index], valid[index], position[index], rows[index]
                cache.batch_select_indices(index)
        position = position + 1
        padded_rows = any(padding[row // k] for row in active)
        mask = make_mask(model.config, valid[:, : width + step + 1], width, steps, 1) if padded_rows else None
        logits = next_logits(tokens[:, None], mask, position)
    return [ids[: next((n for n, token in enumerate(ids, 1) if token in ends), steps)] for ids in found.tolist()]


def make_mask(config: Any, valid: Tensor, width: int, steps: int, queries: int | None = None) -> Tensor:
    """Return which keys [rows, 1, queries, keys] the last tokens attend to; by default all tokens are queries.

    valid is [rows, keys]. transformers would make the same mask, but the host would wait for the device at each token.
    It has to make the mask of a sliding window that is shorter than the row.
    """
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < width + steps:
        return valid
    keys = valid.shape[1]
    causal = torch.ones(keys, keys, dtype=torch.bool, device=valid.device).tril()[-(queries or keys) :]
    return causal & valid.bool()[:, None, None]


def compute_last_hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache
) -> Tensor:
    """Return [rows, n, H] for n new tokens per row, and add their keys and values to the cache.

    attention_mask covers the cached tokens and the new ones; None if no row is padded. Raises a UserError if the model
    leaves the cache unused.
    """
    # transformers renamed this argument. Under the other name, models ignore it.
    names = [name for name in CACHE_NAMES if name in signature(model.base_model.forward).parameters]
    before = cache.get_seq_length()
    out = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=True,
        **{name: cache for name in names[:1]},
    )  # fmt: skip
    if cache.get_seq_length() != before + input_ids.shape[1]:
        raise UserError(
            f"{model.config.model_type}: the model added {cache.get_seq_length() - before} of {input_ids.shape[1]} "
            f"tokens to the cache that sampling passed as {' or '.join(CACHE_NAMES)}. Sample with sampler=vllm or "
            "sampler=endpoint, or install another version of transformers."
        )
    return out.last_hidden_state


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
        return {"reference": reference.fingerprint, "version": 3}

    def check(self) -> None:
        """Do nothing: this sampler always runs."""

    def __call__(
        self, reference: Any, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress
    ) -> Samples:
        """Return K samples per prompt, in order."""
        model = reference.policy.model
        with reference.precision(), adapter_off(model):
            return sample(model, reference.pretrained.chat, prompts, sampling, advance)

    def release(self) -> None:
        """Do nothing: the reference releases its own model."""
