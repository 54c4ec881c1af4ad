"""Log-probabilities of a micro-batch's responses under its other prompts.

Pairings are packed on the host, when the batch is made: tokens on a GPU would have to be read back in each step.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from var.models.packing import Packed, pack, pack_tree


def pack_crossed(ids: Sequence[Sequence[int]], starts: Sequence[int], prompts: Sequence[int] | None = None) -> Packed:
    """Return the P·B sequences of each prompt with each response. Each prompt is encoded once.

    Args:
        ids: [B] tokens of each sequence, prompt and response.
        starts: [B] index at which each response starts.
        prompts: [P] which sequences' prompts; None for all B.
    """
    responses = [row[start:] for row, start in zip(ids, starts, strict=True)]
    asked = range(len(ids)) if prompts is None else prompts
    return pack_tree([ids[i][: starts[i]] for i in asked], [responses] * len(asked))


def pack_crossed_parts(ids: Sequence[Sequence[int]], starts: Sequence[int], parts: int) -> tuple[Packed, ...]:
    """Return `pack_crossed` in parts, so that a pass needs less memory.

    With fewer prompts than parts, the first one repeats: a sharded model requires as many passes of all ranks.
    """
    split = np.array_split(np.arange(len(ids)), parts)
    return tuple(pack_crossed(ids, starts, prompts.tolist() or [0]) for prompts in split)


def pack_mismatched(ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Packed:
    """Return the B sequences of each prompt with the next sequence's response; for arguments see `pack_crossed`."""
    responses = [row[start:] for row, start in zip(ids, starts, strict=True)]
    responses = [*responses[1:], responses[0]]
    rows = [[*row[:start], *response] for row, start, response in zip(ids, starts, responses, strict=True)]
    return pack(rows, starts)


def cross_logps(policy: Callable[[Packed], Tensor], *crossed: Packed) -> Tensor:
    """Return [P, B] float64 nats: log π(y_j|x_i) for each pair, summed over tokens, of `pack_crossed` or its parts."""
    sums = [part.sum_by_sequence(policy(part).double()).view(len(part.group_sizes), -1) for part in crossed]
    return torch.cat(sums)


@torch.no_grad()
def mismatched_logps(policy: Callable[[Packed], Tensor], mismatched: Packed | None) -> Tensor:
    """Return [B] float64 nats: log π(y_{i+1}|x_i), summed over tokens, of `pack_mismatched`.

    KTO estimates its KL divergence from these.
    """
    assert mismatched is not None
    return mismatched.sum_by_sequence(policy(mismatched).double())
