"""Packed: a micro-batch of sequences in one row of tokens, without padding."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Tokens start..stop attend causally to themselves, and to all of prefix_start..prefix_stop, an earlier segment."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A micro-batch of B sequences with T tokens, of which the N response tokens of all sequences are scored.

    T does not count the last token of a sequence, which predicts nothing, and counts a shared prompt once. The fields
    that default to None hold what a loss requires, and are None for losses that do not require them.
    """

    input_ids: Tensor
    """[T] tokens."""
    position_ids: Tensor
    """[T] position of each token within its sequence."""
    segments: tuple[Segment, ...]
    """Which tokens attend to each other; the segments cover the T tokens in order."""
    predictor: Tensor
    """[N] index into the T tokens of the position whose logits predict the response token."""
    target: Tensor
    """[N] response tokens."""
    sequence: Tensor
    """[N] sequence of each response token, 0..B-1."""
    length: Tensor
    """[B] number of response tokens."""
    group: Tensor
    """[B] group of each sequence: its prompt, 0..G-1."""
    group_sizes: tuple[int, ...]
    """[G] number of sequences of each group, on the host: reading it from `group` would wait for the device."""
    ids: tuple[str, ...]
    """[B] names of the sequences, for messages."""
    tokens: int
    """Tokens of all sequences, each with its own prompt and its last token."""
    global_tokens: float = 1.0
    """Response tokens of the optimizer step, over all ranks and accumulated micro-batches; a divisor of the loss."""
    global_sequences: float = 1.0
    """Sequences of the optimizer step; a divisor of the loss."""
    global_groups: float = 1.0
    """Units of the optimizer step, which are pairs if the loss compares pairs; a divisor of the loss."""
    padding: bool = False
    """Whether the batch only keeps the ranks in step. Its loss is multiplied by 0 and its metrics count nothing."""
    weights: Tensor | None = None
    """[B] weight of each sequence, unitless."""
    rewards: Tensor | None = None
    """[B] reward of each sequence, in reward units."""
    cross_rewards: Tensor | None = None
    """[B, B] reward of response j under prompt i, in reward units."""
    reference_logps: Tensor | None = None
    """[N] log-probability of each response token under the reference, in nats."""
    cross_logps: Tensor | None = None
    """[B, B] log-probability of response j under prompt i by the reference, summed over tokens, in nats."""
    advantages: Tensor | None = None
    """[B] advantage of each sequence, in reward units."""
    desirable: Tensor | None = None
    """[B] whether the response is a desirable one, for KTO."""
    mismatched_logps: Tensor | None = None
    """[B] log-probability of the next sequence's response by the policy, summed over tokens, in nats."""
    mismatched_reference_logps: Tensor | None = None
    """[B] the same by the reference, in nats."""
    old_logps: Tensor | None = None
    """[N] log-probability of each response token under the policy that sampled it, in nats."""
    values: Tensor | None = None
    """[N] value of the state before each response token, in reward units; may carry a gradient."""
    old_values: Tensor | None = None
    """[N] the same by the value head at sampling time, in reward units."""
    mismatched: "Packed | None" = None
    """B sequences: each prompt with the next sequence's response."""
    crossed: "tuple[Packed, ...]" = ()
    """B·B sequences in parts: each prompt with each response, prompt by prompt. The last parts can repeat a prompt."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What requirements outside the package provide, by name."""

    def __len__(self) -> int:
        return len(self.length)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """Return a copy on `device`. From pinned memory to a GPU, `non_blocking` does not wait for the GPU."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> "Packed":
        """Return a copy in pinned memory, for an asynchronous transfer to a GPU. Without a GPU, return this batch."""
        return self._with(Tensor.pin_memory) if torch.cuda.is_available() else self

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        changed: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, Packed):
                changed[name] = value._with(change)
            elif name == "crossed":
                changed[name] = tuple(part._with(change) for part in value)
        return replace(self, **changed, extra={name: change(tensor) for name, tensor in self.extra.items()})

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Return [B] sums of `values` [N] over the response tokens of each sequence.

        Sums are accumulated in float64: in float32 the error is hundredths of a nat at some thousand tokens.
        """
        sums = values.new_zeros(len(self), dtype=torch.float64)
        return sums.index_add(0, self.sequence, values.double()).to(values.dtype)


def pack(
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    names: Sequence[str] | None = None,
    group: Sequence[int] | None = None,
    share: bool = False,
    **extra: Any,
) -> Packed:
    """Pack B sequences, where ids[i][starts[i]:] is the response of sequence i; `extra` are further fields.

    If `share` is true, the tokens of a prompt are stored once for consecutive sequences that answer it, as a tree.
    The results then differ by rounding, hundredths of a nat in bf16, so compare only sequences packed the same way.
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
    """Pack each prompt once, with responses[i] as branches of prompts[i]. Sequences are ordered by prompt.

    A branch attends to its prompt and to itself, and its positions continue those of the prompt, so that results are
    those of each sequence alone. A prompt with a single response forms one segment with it.
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
    length, count = torch.tensor(lengths, dtype=torch.long), len(lengths)
    group = prompt_of if group is None else group
    return Packed(
        input_ids=torch.tensor(tokens),
        position_ids=torch.tensor(positions),
        segments=tuple(segments),
        predictor=torch.tensor(predictor, dtype=torch.long),
        target=torch.tensor(target, dtype=torch.long),
        sequence=torch.repeat_interleave(torch.arange(count), length),
        length=length,
        group=torch.tensor(list(group), dtype=torch.long),
        group_sizes=count_by_group(group),
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
    """Pack complete sequences for a RewardModel: all tokens are kept, and none is a response token."""
    count = len(ids)
    group = range(count) if group is None else group
    return replace(
        pack_tree(ids, [[]] * count, **extra),
        length=torch.zeros(count, dtype=torch.long),
        group=torch.tensor(list(group)),
        group_sizes=count_by_group(group),
        ids=tuple(names if names is not None else map(str, range(count))),
        tokens=sum(map(len, ids)),
    )


def count_by_group(group: Sequence[int]) -> tuple[int, ...]:
    """Return the number of sequences of each group 0..G-1."""
    counts = Counter(group)
    return tuple(counts[number] for number in range(len(counts)))
