"""Log-probabilities of a micro-batch's responses under its other prompts."""

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from var.models.packing import Packed, pack, pack_tree


def cross_logps(policy: Callable[[Packed], Tensor], batch: Packed) -> Tensor:
    """Return [B, B] float64 nats: log π(y_j|x_i) for each pair, summed over tokens. Each prompt is encoded once."""
    ids, starts = unpack_sequences(batch)
    prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
    responses = [row[start:] for row, start in zip(ids, starts, strict=True)]
    tree = pack_tree(prompts, [responses] * len(prompts)).to(batch.input_ids.device)
    return tree.sum_by_sequence(policy(tree).double()).view(len(batch), len(batch))


@torch.no_grad()
def mismatched_logps(policy: Callable[[Packed], Tensor], batch: Packed) -> Tensor:
    """Return [B] float64 nats: log π(y_{i+1}|x_i), the next sequence's response under each prompt, summed over tokens.

    KTO estimates its KL divergence from these.
    """
    ids, starts = unpack_sequences(batch)
    responses = [row[start:] for row, start in zip(ids, starts, strict=True)]
    responses = [*responses[1:], responses[0]]
    rows = [row[:start] + response for row, start, response in zip(ids, starts, responses, strict=True)]
    packed = pack(rows, starts).to(batch.input_ids.device)
    return packed.sum_by_sequence(policy(packed).double())


def unpack_sequences(batch: Packed) -> tuple[list[list[int]], list[int]]:
    """Return a packed batch as lists of tokens, prompt and response, and the index at which each response starts."""
    tokens, ids, starts = batch.input_ids.tolist(), [], []
    prompt_starts = [segment.start for segment in batch.segments if not segment.prefix_stop]
    prompt_ends = batch.predictor[batch.length.cumsum(0) - batch.length].tolist()  # each prompt's last token
    for end, response in zip(prompt_ends, batch.target.split(batch.length.tolist()), strict=True):
        prompt = tokens[prompt_starts[bisect_right(prompt_starts, end) - 1] : end + 1]
        ids.append([*prompt, *response.tolist()])
        starts.append(len(prompt))
    return ids, starts
