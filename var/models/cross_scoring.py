"""Log-probabilities of a micro-batch's responses under its other prompts.

Pairings are packed on the host, when the batch is made: tokens on a GPU would have to be read back in each step.
"""

from collections.abc import Callable, Sequence
from math import isqrt

import torch
from torch import Tensor

from var.models.packing import Packed, pack, pack_tree


def pack_crossed(ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Packed:
    """Return the B·B sequences of each prompt with each response. Each prompt is encoded once.

    Args:
        ids: [B] tokens of each sequence, prompt and response.
        starts: [B] index at which each response starts.
    """
    prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
    responses = [row[start:] for row, start in zip(ids, starts, strict=True)]
    return pack_tree(prompts, [responses] * len(prompts))


def pack_mismatched(ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Packed:
    """Return the B sequences of each prompt with the next sequence's response; for arguments see `pack_crossed`."""
    responses = [row[start:] for row, start in zip(ids, starts, strict=True)]
    responses = [*responses[1:], responses[0]]
    rows = [[*row[:start], *response] for row, start, response in zip(ids, starts, responses, strict=True)]
    return pack(rows, starts)


def cross_logps(policy: Callable[[Packed], Tensor], crossed: Packed | None) -> Tensor:
    """Return [B, B] float64 nats: log π(y_j|x_i) for each pair, summed over tokens, of `pack_crossed`."""
    assert crossed is not None
    count = isqrt(len(crossed))
    return crossed.sum_by_sequence(policy(crossed).double()).view(count, count)


@torch.no_grad()
def mismatched_logps(policy: Callable[[Packed], Tensor], mismatched: Packed | None) -> Tensor:
    """Return [B] float64 nats: log π(y_{i+1}|x_i), summed over tokens, of `pack_mismatched`.

    KTO estimates its KL divergence from these.
    """
    assert mismatched is not None
    return mismatched.sum_by_sequence(policy(mismatched).double())
