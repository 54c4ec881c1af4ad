"""Sample from a model in this process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from var.data.chat import Chat
from var.data.rows import Message
from var.models.attention import attention
from var.models.lora import adapter_off
from var.sampling.base import Sampling, _seed, decode


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
        [(decode(chat, ids), finished) for ids, finished in several]
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

    Prompts are batched by length, so little is padded; each is read once for its K responses, and a response that has
    ended leaves the batch. A response has random numbers of its own, by seed, prompt and number among the K: what
    else is sampled beside it changes its text by rounding at most.
    """
    k = sampling.responses
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), encoded[i]))
    responses: list[list[tuple[list[int], bool]]] = [[] for _ in encoded]
    training = model.training
    model.eval()
    with attention(model, "sdpa"):
        for some in sampling.batches([len(encoded[i]) for i in order]):
            batch = order[some]
            sampled = _continued(model, [encoded[i] for i in batch], sampling, chat.end_token)
            for i, at in zip(batch, range(0, len(sampled), k), strict=True):
                responses[i] = sampled[at : at + k]
            advance(len(batch))
    model.train(training)
    return responses


def _continued(model: Any, prompts: list[list[int]], sampling: Sampling, end: int) -> list[tuple[list[int], bool]]:
    """K (tokens, finished) of each prompt, prompt by prompt, all at once. Padding stands on the left."""
    k, most, width, device = sampling.responses, sampling.max_new_tokens, max(map(len, prompts)), model.device
    numbers = [np.random.default_rng(_seed(sampling.seed, prompt)).random((k, most)) for prompt in prompts]
    draws = torch.from_numpy(np.concatenate(numbers)).to(device)  # [B·K, most], in double precision
    weight = model.get_output_embeddings().weight
    head = weight.to(torch.promote_types(weight.dtype, torch.float32))  # logits as the engine scores them
    cache = DynamicCache(config=model.config)

    def logits(tokens: Tensor, mask: Tensor) -> Tensor:
        """[rows, V] after the last of `tokens` [rows, n], the newest of those that `mask` counts."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
        with torch.autocast(device.type, enabled=False):
            return torch.nn.functional.linear(out.last_hidden_state[:, -1].to(head.dtype), head)

    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    padded = torch.tensor([[end] * (width - len(ids)) + ids for ids in prompts], device=device)
    scores = logits(padded, mask).repeat_interleave(k, 0)
    cache.batch_repeat_interleave(k)
    mask, live = mask.repeat_interleave(k, 0), torch.arange(len(prompts) * k, device=device)
    texts: list[list[int]] = [[] for _ in live]
    finished = [False] * len(live)
    for at in range(most):
        tokens = choose(scores, draws[live, at], sampling)
        going = tokens != end
        for row, token, goes in zip(live.tolist(), tokens.tolist(), going.tolist(), strict=True):
            texts[row] += [token] * goes
            finished[row] = not goes
        if not going.all():
            rows = going.nonzero()[:, 0]
            tokens, mask, live = tokens[rows], mask[rows], live[rows]
            cache.batch_select_indices(rows)
        if not len(live) or at + 1 == most:
            break
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        scores = logits(tokens[:, None], mask)
    return list(zip(texts, finished, strict=True))


def choose(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """[rows] tokens of logits [rows, V], each by one number in [0, 1): where the cumulative probability passes it.

    In double precision: in fp32 the sum over a large vocabulary would shift the odds of its last tokens.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    odds = (logits.double() / sampling.temperature).softmax(-1)
    tokens = None
    if sampling.top_p < 1:
        odds, tokens = odds.sort(dim=-1, descending=True)
        odds = odds.where(odds.cumsum(-1) - odds < sampling.top_p, 0.0)
    sums = odds.cumsum(-1)
    place = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return (place if tokens is None else tokens.gather(-1, place))[:, 0]


@dataclass(frozen=True, kw_only=True)
class Transformers:
    """The reference itself, as it scores."""

    def identity(self, reference: Any) -> dict[str, Any]:
        return {"reference": reference.identity, "version": 2}

    def check(self) -> None:
        pass

    def __call__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[tuple[str, bool]]]:
        model = reference.policy.model
        with reference.precision(), adapter_off(model):
            return sample(model, reference.pretrained.chat, prompts, sampling, advance)

    def release(self) -> None:
        pass  # the model is the reference's, which lets it go itself
