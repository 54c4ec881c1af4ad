"""Packed: several sequences in one row of tokens, without padding; which tokens are response travels with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Tokens start..stop attend to themselves, causally, and to all of prefix_start..prefix_stop, a segment before."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A micro-batch. [T] tokens, [N] response tokens, [B] sequences, N counted over all of them.

    input_ids, position_ids: [T]. A sequence's last token predicts nothing and is not among them; a prompt that several
    share is there once. tokens: of all sequences, each with its own prompt and its last token.
    segments: who attends to whom; they cover the T tokens in order.
    predictor: [N] index into the T tokens: the position whose logits predict the response token.
    target: [N] the response tokens. sequence: [N] their sequence, 0..B-1. length: [B] response tokens.
    group: [B] the prompt a sequence answers, 0..G-1. ids: [B] names for messages.
    global_tokens, global_sequences, global_groups: of the whole optimiser step, over ranks and accumulation: the
    loss's divisors. Groups are pairs where the loss compares pairs.
    The rest is what losses ask for (needs.py), absent where none does. weights, rewards, advantages [B]; cross_*
    [B, B]; *_logps [N], of the response tokens, but mismatched_* [B], summed; values [N], which may hold a gradient.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    predictor: Tensor
    target: Tensor
    sequence: Tensor
    length: Tensor
    group: Tensor
    ids: tuple[str, ...]
    tokens: int
    global_tokens: float = 1.0
    global_sequences: float = 1.0
    global_groups: float = 1.0
    padding: bool = False
    weights: Tensor | None = None
    rewards: Tensor | None = None
    cross_rewards: Tensor | None = None
    reference_logps: Tensor | None = None
    cross_logps: Tensor | None = None
    advantages: Tensor | None = None
    desirable: Tensor | None = None
    mismatched_logps: Tensor | None = None
    mismatched_reference_logps: Tensor | None = None
    old_logps: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None

    def __len__(self) -> int:
        return len(self.length)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """A copy on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> "Packed":
        """A copy in memory from which a GPU takes it without the CPU waiting."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """[N] → [B]: sums over each sequence's response tokens."""
        return values.new_zeros(len(self)).index_add(0, self.sequence, values)


def pack(
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    names: Sequence[str] | None = None,
    group: Sequence[int] | None = None,
    share: bool = False,
    **extra: Any,
) -> Packed:
    """Pack B sequences, ids[i][starts[i]:] being the response of the i-th; nothing is padded.

    share: neighbours that answer the same prompt have its tokens once, as branches of a tree; the numbers are those
    of the sequences alone, but for rounding, which in bf16 is hundredths of a nat: what is set beside each other is to
    be packed alike.
    """
    prompts: list[Sequence[int]] = []
    responses: list[list[Sequence[int]]] = []
    for row, start in zip(ids, starts, strict=True):
        if not 0 < start < len(row):
            raise ValueError(f"a sequence needs a prompt and a response: {len(row)} tokens, response from {start}")
        if not (share and prompts and prompts[-1] == row[:start]):
            prompts.append(row[:start])
            responses.append([])
        responses[-1].append(row[start:])
    return pack_tree(prompts, responses, names, group if group is not None else range(len(ids)), **extra)


def pack_tree(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    names: Sequence[str] | None = None,
    group: Sequence[int] | None = None,
    **extra: Any,
) -> Packed:
    """Pack each prompt once with its responses as branches: sequence order is prompt by prompt.

    responses[i] are the responses scored under prompts[i]; each branch attends to its prompt and to itself, and
    positions go on after the prompt, so that the numbers are those of the sequence alone. A prompt's only response
    stands in one segment with it.
    """
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predictor: list[int] = []
    target: list[int] = []
    lengths: list[int] = []
    prompt_of: list[int] = []
    for i, (prompt, branches) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt or not all(branches):
            raise ValueError("prompts and responses need at least one token each")
        start, stop = len(tokens), len(tokens) + len(prompt)
        tokens.extend(prompt)
        positions.extend(range(len(prompt)))
        if len(branches) != 1:
            segments.append(Segment(start, stop))
        for branch in branches:
            offset, body = len(tokens), branch[:-1]
            tokens.extend(body)
            positions.extend(range(len(prompt), len(prompt) + len(body)))
            if len(branches) == 1:
                segments.append(Segment(start, len(tokens)))
            elif body:
                segments.append(Segment(offset, len(tokens), start, stop))
            predictor.extend([stop - 1, *range(offset, len(tokens))])
            target.extend(branch)
            lengths.append(len(branch))
            prompt_of.append(i)
    length, count = torch.tensor(lengths), len(lengths)
    return Packed(
        input_ids=torch.tensor(tokens),
        position_ids=torch.tensor(positions),
        segments=tuple(segments),
        predictor=torch.tensor(predictor),
        target=torch.tensor(target),
        sequence=torch.repeat_interleave(torch.arange(count), length),
        length=length,
        group=torch.tensor(list(group if group is not None else prompt_of)),
        ids=tuple(names if names is not None else map(str, range(count))),
        tokens=sum(len(prompts[i]) for i in prompt_of) + sum(lengths),
        **extra,
    )


def whole(
    ids: Sequence[Sequence[int]],
    names: Sequence[str] | None = None,
    group: Sequence[int] | None = None,
    **extra: Any,
) -> Packed:
    """Whole sequences in one row, for a RewardModel: nothing is response, every token is seen."""
    lengths = [len(row) for row in ids]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    empty = torch.zeros(0, dtype=torch.long)
    return Packed(
        input_ids=torch.tensor([token for row in ids for token in row]),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        segments=tuple(Segment(a, b) for a, b in pairwise(bounds)),
        predictor=empty,
        target=empty,
        sequence=empty,
        length=torch.zeros(len(lengths), dtype=torch.long),
        group=torch.tensor(list(group) if group is not None else range(len(lengths))),
        ids=tuple(names if names is not None else map(str, range(len(lengths)))),
        tokens=sum(lengths),
        **extra,
    )
