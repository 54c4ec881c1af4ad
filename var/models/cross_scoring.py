"""Log-probabilities of a micro-batch's responses under its other prompts."""

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from var.models.packing import Packed, pack, pack_tree


def cross_logps(policy: Callable[[Packed], Tensor], batch: Packed) -> Tensor:
    """[B, B] nats: log π(y_j|x_i) of a batch's own sequences, summed over tokens; each prompt is encoded once."""
    ids, starts = unpack_sequences(batch)
    prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
    responses = [row[start:] for row, start in zip(ids, starts, strict=True)]
    tree = pack_tree(prompts, [responses] * len(prompts)).to(batch.input_ids.device)
    return tree.sum_by_sequence(policy(tree)).view(len(batch), len(batch))


@torch.no_grad()
def mismatched_logps(policy: Callable[[Packed], Tensor], batch: Packed) -> Tensor:
    """[B] nats, summed: log π(y_{i+1}|x_i), the next sequence's response under each prompt (KTO's estimate of a KL)."""
    ids, starts = unpack_sequences(batch)
    responses = [row[start:] for row, start in zip(ids, starts, strict=True)]
    rows = [
        row[:start] + response for row, start, response in zip(ids, starts, [*responses[1:], responses[0]], strict=True)
    ]
    packed = pack(rows, starts).to(batch.input_ids.device)
    return packed.sum_by_sequence(policy(packed))


def unpack_sequences(batch: Packed) -> tuple[list[list[int]], list[int]]:
    """A packed batch as token lists and where each response starts."""
    tokens, ids, starts = batch.input_ids.tolist(), [], []
    begins = [segment.start for segment in batch.segments if not segment.prefix_stop]
    ends = batch.predictor[batch.length.cumsum(0) - batch.length].tolist()  # of the prompts: their last tokens
    for end, response in zip(ends, batch.target.split(batch.length.tolist()), strict=True):
        prompt = tokens[begins[bisect_right(begins, end) - 1] : end + 1]
        ids.append([*prompt, *response.tolist()])
        starts.append(len(prompt))
    return ids, starts
