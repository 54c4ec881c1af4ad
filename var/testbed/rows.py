"""Training rows of the exact testbed, and batches of them as every loss of the package reads them.

`make_rows` takes prompts with K responses each and adds what the loss needs, as the data module does for text.
`pack_rows` makes one batch of rows.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from var.data.plan import draw
from var.models.packing import Packed
from var.requirements import (
    Advantages,
    Desirable,
    Groups,
    MismatchedLogps,
    Pairs,
    ReferenceLogps,
    Rollout,
    Weights,
    find,
)
from var.testbed.policies import TabularPolicy
from var.testbed.world import World, expectation
from var.weights.estimators import compute_weights

MICRO_BATCH = 8  # B of an in-batch weight
Labels = Literal["reward", "bradley_terry"]  # the better response has the higher reward, or wins a Bradley-Terry draw


@dataclass(frozen=True, kw_only=True)
class Rows:
    """n rows (x, y) in the order in which they train."""

    prompts: Tensor
    """[n] int."""
    responses: Tensor
    """[n] int."""
    group: Tensor
    """[n] int, the question that a row answers. A prompt that is drawn twice is two questions."""
    unit: int
    """The number of consecutive rows that stay together: 2 for pairs, K for groups, otherwise 1."""
    columns: dict[str, Tensor]
    """[n] each, by the name of the batch's field."""

    def __len__(self) -> int:
        """Return n."""
        return len(self.prompts)

    def take(self, index: Tensor) -> "Rows":
        """Return the rows at index [m] int."""
        rows = {name: getattr(self, name)[index] for name in ("prompts", "responses", "group")}
        return replace(self, **rows, columns={name: column[index] for name, column in self.columns.items()})


def make_rows(
    world: World,
    loss: Any,
    prompts: Tensor,
    answers: Tensor,
    generator: torch.Generator,
    *,
    rewards: Tensor | None = None,
    weights: Tensor | None = None,
    best: bool = False,
    labels: Labels = "reward",
) -> Rows:
    """Return the rows on which `loss` trains. Rows that need not stay together are shuffled.

    Pairs of two equal responses are omitted.

    Args:
        world: the world of the prompts.
        loss: what it needs decides on pairs, groups and columns.
        prompts: [Q] int.
        answers: [Q, K] int, K responses to each prompt.
        generator: draws labels, the order, the rows of A-LoL and the candidates of a sampled Z.
        rewards: [P, Y], the rewards that the loss sees. None: those of the world.
        weights: [P, Y], a weight column of the data.
        best: train on the best of the K responses only (rejection sampling).
        labels: how the better response of a pair is chosen.
    """
    rewards = world.rewards if rewards is None else rewards
    question = torch.arange(len(prompts))
    if best:
        answers = answers.gather(1, rewards[prompts[:, None], answers].argmax(1, keepdim=True))
    if any(find(loss.requires, kind) for kind in (Pairs, Desirable)):
        pairs = answers.reshape(-1, 2)
        question = question.repeat_interleave(answers.shape[1] // 2)
        different = pairs[:, 0] != pairs[:, 1]
        answers, question = pairs[different], question[different]
        answers = order_pairs(rewards[prompts[question][:, None], answers], answers, labels, generator)
    size = answers.shape[1]
    group = question.repeat_interleave(size)
    unit = size if any(find(loss.requires, kind) for kind in (Pairs, Groups, Rollout)) else 1
    rows = Rows(prompts=prompts[group], responses=answers.reshape(-1), group=group, unit=unit, columns={})
    if find(loss.requires, Desirable):
        rows.columns["desirable"] = torch.arange(len(rows)) % 2 == 0
    if weights is not None:
        rows.columns["weights"] = weights[rows.prompts, rows.responses]
    if unit == 1:
        rows = rows.take(torch.randperm(len(rows), generator=generator))
    rows.columns["rewards"] = rewards[rows.prompts, rows.responses]
    if required := find(loss.requires, Weights):
        rows.columns["weights"] = weight_rows(world, required, rows, rewards, generator)
    if advantages := find(loss.requires, Advantages):  # with the exact V(x) = E_{π_ref}[r]
        rows.columns["advantages"] = rows.columns["rewards"] - expectation(world.logps, rewards)[rows.prompts]
        seed = int(torch.randint(2**31, (), generator=generator))
        drawn = torch.from_numpy(draw(rows.columns["advantages"].numpy(), advantages.draw, seed))
        rows = rows.take(drawn[torch.randperm(len(drawn), generator=generator)])
    return rows


def order_pairs(rewards: Tensor, pairs: Tensor, labels: Labels, generator: torch.Generator) -> Tensor:
    """Return pairs [n, 2] with rewards [n, 2] so that the better response is first."""
    gap = rewards[:, 1] - rewards[:, 0]
    swap = gap > 0
    if labels == "bradley_terry":
        swap = torch.rand(len(pairs), dtype=torch.float64, generator=generator) < gap.sigmoid()
    return torch.where(swap[:, None], pairs.flip(1), pairs)


def weight_rows(world: World, required: Weights, rows: Rows, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """Return [n] VAR's weights of mean 1. Rows after the last full micro-batch have in-batch weight 0."""
    full = len(rows) - len(rows) % MICRO_BATCH
    micro = torch.arange(full).view(-1, MICRO_BATCH) if required.estimator.needs_plan else None
    inputs = replace(world, rewards=rewards).weight_inputs(rows.prompts, rows.responses, micro)
    questions, group = rows.group.unique(return_inverse=True)
    asked = torch.zeros(len(questions), dtype=torch.long)
    asked[group] = rows.prompts
    candidates = None
    if "candidates" in required.estimator.inputs:
        prompts = asked[:, None].expand(-1, required.estimator.candidates)
        candidates = rewards[prompts, world.sample(prompts, generator)]
    inputs = replace(inputs, group=group, features=world.features[asked], candidates=candidates)
    uniform = torch.rand(len(group), dtype=torch.float64, generator=generator) if required.roulette else None
    return compute_weights(required, inputs, uniform)


def pack_rows(world: World, loss: Any, rows: Rows, policy: TabularPolicy) -> Packed:
    """Return `rows` as one optimizer step: the batch that `pack` returns, without the text, which no loss reads."""
    length, mask = world.responses.length[rows.responses], world.responses.mask[rows.responses]
    _, group, sizes = rows.group.unique(return_inverse=True, return_counts=True)
    target = world.responses.path[1][rows.responses][mask]
    packed = Packed(
        input_ids=target, position_ids=target, segments=(), predictor=target, target=target, ids=(), tokens=len(target),
        sequence=torch.repeat_interleave(length), length=length, group=group, group_sizes=tuple(sizes.tolist()),
        global_tokens=float(len(target)), global_sequences=float(len(rows)), global_groups=float(len(sizes)),
        **rows.columns,  # type: ignore[arg-type]
    )  # fmt: skip
    if find(loss.requires, ReferenceLogps):
        packed = replace(packed, reference_logps=world.token_logps[rows.prompts, rows.responses][mask])
    if find(loss.requires, MismatchedLogps):
        following = rows.responses.roll(-1)
        packed = replace(
            packed,
            mismatched_logps=policy.logps()[rows.prompts, following],
            mismatched_reference_logps=world.logps[rows.prompts, following],
        )
    return packed
