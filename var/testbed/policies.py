"""Policies of the enumerable world, and batches of its rows as every loss of the package reads them.

A policy is a table of next-token logits, each prompt's own or made of shared parameters; both start at π_ref. Which
answers train is the caller's affair: `make_rows` takes prompts with K answers each and brings what the loss's `needs`
name, as the data module does for text, and `batch` packs some of the rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from var.data.plan import draw
from var.models.packing import Packed
from var.requirements import Need
from var.testbed.world import World, expectation

MICRO_BATCH = 8  # B of an in-batch weight


Labels = Literal["reward", "bradley_terry"]


class TabularPolicy(nn.Module, ABC):
    """π_θ over all prompts of a world; forward is what a loss gets of rows (x, y)."""

    def __init__(self, world: World, critic: bool) -> None:
        super().__init__()
        self.responses = world.responses
        shape = world.logits.shape[:-1]
        self.state_values = nn.Parameter(torch.zeros(shape, dtype=torch.float64)) if critic else None

    @abstractmethod
    def logits(self) -> Tensor:
        """[P, H, V]: of the next token after each prefix."""

    def forward(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor | None]:
        """prompts, responses [B] → [N] nats, the log-probability of each response token, sequence after sequence; and
        [N], the value before it, where there is a critic."""
        x, prefix, token = self._tokens(prompts, responses)
        logps = self.logits().log_softmax(-1)[x, prefix, token]
        return logps, None if self.state_values is None else self.state_values[x, prefix]

    @torch.no_grad()
    def logps(self) -> Tensor:
        """[P, Y] nats: log π_θ of every response."""
        return self.responses.logps(self.logits())

    def _tokens(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = self.responses.mask[responses]
        prefix, token = (part[responses][mask] for part in self.responses.path)
        return prompts.repeat_interleave(mask.sum(1)), prefix, token


class Table(TabularPolicy):
    """Every logit is a parameter: what an objective's optimum is, apart from what can be learnt of it elsewhere.

    critic: a value for each prompt and prefix beside it, for PPO; at first 0.
    """

    def __init__(self, world: World, critic: bool = False) -> None:
        super().__init__(world, critic)
        self.table = nn.Parameter(world.logits.clone())

    def logits(self) -> Tensor:
        return self.table


class Shared(TabularPolicy):
    """π_ref's logits plus a map, linear in (1, x), from a prompt's features to a change of all next-token logits.

    Prompts without data move with the others, and few rows are too few: a good weight is told from a noisy one.
    """

    def __init__(self, world: World, critic: bool = False) -> None:
        super().__init__(world, critic)
        ones = torch.ones(len(world), 1, dtype=torch.float64)
        self.features = torch.cat([ones, world.features / world.features.shape[1] ** 0.5], 1)
        self.reference = world.logits
        self.map = nn.Parameter(torch.zeros(self.features.shape[1], *world.logits.shape[1:], dtype=torch.float64))

    def logits(self) -> Tensor:
        return self.reference + torch.einsum("pf,fhv->phv", self.features, self.map)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """n rows (x, y) in the order of training, `unit` at a time (a pair, a group, or 1), and columns [n].

    group [n] int: the question that a row answers; a prompt that is asked twice is two.
    """

    prompts: Tensor
    responses: Tensor
    group: Tensor
    unit: int
    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, index: Tensor) -> "Rows":
        """Some of the rows [m] int, columns with them."""
        columns = {name: column[index] for name, column in self.columns.items()}
        return Rows(
            prompts=self.prompts[index], responses=self.responses[index], group=self.group[index], unit=self.unit,
            columns=columns,
        )  # fmt: skip


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
    """What `loss` trains on, of prompts [Q] with answers [Q, K].

    rewards: [P, Y], as the loss is to see them; the world's, if None. weights: [P, Y], the data's own. best: only the
    best of the K (rejection sampling). labels: of a pair, the better is the one of more reward, or a Bradley-Terry
    draw of it. Pairs of one answer twice are left out. Where a loss takes each row alone, rows are shuffled.
    """
    rewards = world.rewards if rewards is None else rewards
    paired = Need.PAIRS in loss.needs or Need.DESIRABLE in loss.needs
    grouped = Need.GROUPS in loss.needs or Need.ROLLOUT in loss.needs
    question = torch.arange(len(prompts))
    if best:
        answers = answers.gather(1, rewards[prompts[:, None], answers].argmax(1, keepdim=True))
    if paired:
        pairs = answers.reshape(-1, 2)
        question = question.repeat_interleave(answers.shape[1] // 2)
        different = pairs[:, 0] != pairs[:, 1]
        answers, question = pairs[different], question[different]
        answers = in_order(rewards[prompts[question][:, None], answers], answers, labels, generator)
    size = answers.shape[1]
    group = question.repeat_interleave(size)
    rows = Rows(
        prompts=prompts[group], responses=answers.reshape(-1), group=group,
        unit=size if Need.PAIRS in loss.needs or grouped else 1, columns={},
    )  # fmt: skip
    if Need.DESIRABLE in loss.needs:
        rows = replace(rows, columns={"desirable": torch.arange(len(rows)) % 2 == 0})
    if weights is not None:
        rows = replace(rows, columns={"weights": weights[rows.prompts, rows.responses]})
    if rows.unit == 1:
        rows = rows.take(torch.randperm(len(rows), generator=generator))
    return with_columns(world, loss, rows, rewards, generator)


def every_row(world: World, weights: Tensor) -> Rows:
    """All P · Y pairs (x, y), whose weights [P, Y] are multiplied by π_ref(y|x): a batch that is the expectation over
    the reference's answers, for a loss that is linear in its weights."""
    count = world.logps.shape[1]
    prompts = torch.arange(len(world)).repeat_interleave(count)
    return Rows(
        prompts=prompts, responses=torch.arange(count).repeat(len(world)), group=prompts, unit=1,
        columns={"weights": (count * world.logps.exp() * weights).flatten()},
    )  # fmt: skip


def in_order(rewards: Tensor, pairs: Tensor, labels: Labels, generator: torch.Generator) -> Tensor:
    """pairs [n, 2] of rewards [n, 2], the better one first."""
    gap = rewards[:, 1] - rewards[:, 0]
    if labels == "bradley_terry":
        swap = torch.rand(len(pairs), dtype=torch.float64, generator=generator) < gap.sigmoid()
    else:
        swap = gap > 0
    return torch.where(swap[:, None], pairs.flip(1), pairs)


def with_columns(world: World, loss: Any, rows: Rows, rewards: Tensor, generator: torch.Generator) -> Rows:
    """Rewards, advantages with the exact V(x) = E_{π_ref}[r], weights; and the rows that A-LoL draws."""
    columns = {**rows.columns, "rewards": rewards[rows.prompts, rows.responses]}
    if Need.ADVANTAGES in loss.needs:
        columns["advantages"] = columns["rewards"] - expectation(world.logps, rewards)[rows.prompts]
    if callable(getattr(loss, "weights", None)):
        columns["weights"] = weights_of(world, loss, rows, rewards, generator)
    rows = replace(rows, columns=columns)
    if Need.ADVANTAGES in loss.needs:
        seed = int(torch.randint(2**31, (), generator=generator))
        drawn = torch.from_numpy(draw(columns["advantages"].numpy(), loss.draw, seed))
        rows = rows.take(drawn[torch.randperm(len(drawn), generator=generator)])
    return rows


def weights_of(world: World, loss: Any, rows: Rows, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """[n] VAR's weights, of mean 1 over the rows; those beyond the last whole micro-batch have none, and are 0."""
    whole = len(rows) - len(rows) % MICRO_BATCH
    micro = torch.arange(whole).view(-1, MICRO_BATCH) if loss.estimator.planned else None
    table = replace(world, rewards=rewards).table(rows.prompts, rows.responses, micro)
    questions, group = rows.group.unique(return_inverse=True)
    asked = torch.zeros(len(questions), dtype=torch.long)
    asked[group] = rows.prompts
    candidates = None
    if Need.CANDIDATE_REWARDS in loss.needs:
        prompts = asked[:, None].expand(-1, loss.estimator.candidates)
        candidates = rewards[prompts, world.sample(prompts, generator)]
    table = replace(table, group=group, features=world.features[asked], candidates=candidates)
    return loss.weights(table)


def batch(world: World, loss: Any, rows: Rows, policy: TabularPolicy | None = None) -> Packed:
    """All of `rows` as one optimiser step: what `pack` gives without the text, of which there is none and no loss
    reads any. policy: for what the loss asks of it beside its log-probabilities, KTO's mismatched ones."""
    length, mask = world.responses.length[rows.responses], world.responses.mask[rows.responses]
    present, group = rows.group.unique(return_inverse=True)
    target = world.responses.path[1][rows.responses][mask]
    packed = Packed(
        input_ids=target, position_ids=target, segments=(), predictor=target, target=target, ids=(), tokens=len(target),
        sequence=torch.repeat_interleave(length), length=length, group=group,
        global_tokens=float(len(target)), global_sequences=float(len(rows)), global_groups=float(len(present)),
        **rows.columns,
    )  # fmt: skip
    if Need.REFERENCE_LOGPS in loss.needs:
        packed = replace(packed, reference_logps=world.token_logps[rows.prompts, rows.responses][mask])
    if Need.MISMATCHED_LOGPS in loss.needs:
        assert policy is not None
        following = rows.responses.roll(-1)
        packed = replace(
            packed,
            mismatched_logps=policy.logps()[rows.prompts, following],
            mismatched_reference_logps=world.logps[rows.prompts, following],
        )
    return packed


def loss_on(world: World, loss: Any, rows: Rows, policy: TabularPolicy) -> Tensor:
    """The loss of one optimiser step on `rows`, with a gradient. Samples of the policy are of it as it is."""
    packed = batch(world, loss, rows, policy)
    logps, values = policy(rows.prompts, rows.responses)
    packed = replace(packed, old_logps=logps.detach())
    if values is not None:
        packed = replace(packed, values=values, old_values=values.detach())
    return loss(logps, packed)[0]
