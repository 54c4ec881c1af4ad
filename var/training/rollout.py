"""Rollouts: the policy answers prompts while it trains, and its rewarded responses are the next batches."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch

from var.annotate.base import Provider, TrainingSet
from var.annotate.responses import describe_copies
from var.data.chat import Chat
from var.data.plan import MicroBatch
from var.data.row import Row
from var.losses.base import Mean
from var.models.packing import Packed, pack
from var.requirements import Rollout
from var.rewards.base import compute_scores
from var.sampling.base import Sampling
from var.utils.console import timed, warn
from var.utils.distributed import Ranks
from var.utils.errors import UserError

SampledTokens = Sequence[Sequence[list[int]]]  # for each prompt the tokens of K responses, with end tokens


class PolicyModule(Protocol):
    """What a rollout uses of the training module."""

    policy: Any
    """The policy."""
    device: Any
    """Its device."""

    def generate(self, chat: Chat, prompts: Sequence[list[int]], sampling: Sampling) -> SampledTokens:
        """Return the tokens of K responses to each encoded prompt, sampled from the policy as it is now."""
        ...

    def record(self, metrics: Mapping[str, Mean]) -> None:
        """Add to the metrics of the step."""
        ...


class RolloutLoader:
    """Yields this rank's micro-batches, from rollouts that are made on demand.

    In a rollout the policy answers the prompts of the next `steps` optimizer steps. Their micro-batches are yielded
    `passes` times.
    A run that is resumed within a rollout samples that rollout again, from the policy of the checkpoint.
    """

    def __init__(
        self,
        data: TrainingSet,
        providers: Sequence[Provider[Any]],
        settings: Rollout,
        module: PolicyModule,
        position: Callable[[int], tuple[int, int]],
        ranks: Ranks,
    ) -> None:
        """Build the loader.

        Args:
            data: the training set, with the plan of prompts.
            providers: the providers of the loss's requirements.
            settings: how often the policy is sampled.
            module: the training module.
            position: returns the epoch and the micro-batch to start from.
            ranks: this process among those of the job.
        """
        self.data, self.providers, self.settings, self.module = data, providers, settings, module
        self.position, self.ranks, self.plan = position, ranks, data.plan
        self.seconds = 0.0
        """Seconds spent on rollouts."""

    def __len__(self) -> int:
        return self.plan.length(self.ranks.world) * self.settings.passes

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, as `PlanLoader` does."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; see `state_dict`."""

    def __iter__(self) -> Iterator[Packed]:
        epoch, start = self.position(len(self))
        micro_batches = list(self.plan.batches(epoch, self.ranks.rank, self.ranks.world))
        per_step = self.plan.turns(self.ranks.world)
        size = per_step * self.settings.steps
        done = 0
        for at in range(0, len(micro_batches), size):
            some = micro_batches[at : at + size]
            count = len(some) * self.settings.passes
            if done + count > start:
                seed = epoch * self.plan.steps + at // per_step  # of the step, whatever its micro-batches and ranks
                yield from (self.sample_batches(some, seed) * self.settings.passes)[max(0, start - done) :]
            done += count

    @torch.no_grad()
    def sample_batches(self, micro_batches: Sequence[MicroBatch], seed: int) -> list[Packed]:
        """Return the batches: prompts with K sampled responses each, rewards, and what the loss requires."""
        started = time.perf_counter()
        data, module = self.data, self.module
        annotator, seconds = data.annotator, data.annotator.seconds
        members = [data.members[micro_batch.number] for micro_batch in micro_batches]
        members = [rows[rows >= 0] for rows in members]
        rows = [data.rows[int(i)] for some in members for i in some]
        prompts = [annotator.chat.prompt(row.prompt) for row in rows]
        sampling = replace(data.sampling, seed=data.sampling.seed + seed)
        with annotator.reference.precision(), timed(seconds, "Sampling"):
            responses = module.generate(annotator.chat, prompts, sampling)
        if not self.seconds and (found := describe_copies(responses, sampling)):  # later, a policy may become certain
            warn(f"the first rollout: {found}. Prompts with equal responses have no advantages, so they train nothing.")
        with timed(seconds, "Scoring"):
            rewards = self._rewards(rows, responses)
        ends = np.cumsum([0, *map(len, members)]).tolist()
        batches = []
        for micro_batch, begin, end in zip(micro_batches, ends, ends[1:], strict=False):
            ids, starts = [], []
            for prompt, several in zip(prompts[begin:end], responses[begin:end], strict=True):
                ids += [prompt + tokens for tokens in several]
                starts += [len(prompt)] * len(several)
            group = np.repeat(np.arange(end - begin), sampling.responses).tolist()
            names = [rows[begin + g].id for g in group]
            fields = {**micro_batch.divisors, "rewards": rewards[begin:end].flatten()}
            batches.append(pack(ids, starts, names, group, share=True, **fields))
        batches = [batch.pinned().to(module.device, non_blocking=True) for batch in self._count_tokens(batches)]
        with timed(seconds, "Reference log-probabilities"), annotator.reference.precision():
            batches = [self._annotate(batch) for batch in batches]
        self._record(micro_batches, ends, rewards, responses)
        self.seconds += time.perf_counter() - started
        return batches

    def _rewards(self, rows: Sequence[Row], responses: SampledTokens) -> torch.Tensor:
        """Return [P, K] rewards on the run's scale."""
        data = self.data
        decode = data.annotator.chat.decode
        triples = [
            (row.prompt, decode(tokens), row.answer)
            for row, several in zip(rows, responses, strict=True)
            for tokens in several
        ]
        raw = compute_scores(data.annotator.reward, *map(list, zip(*triples, strict=True)))
        if not np.isfinite(raw).all():
            bad = int(np.flatnonzero(~np.isfinite(raw))[0])
            raise UserError(
                f"the reward of a sampled response is {raw[bad]}, and must be finite: {triples[bad][1][:60]!r}"
            )
        return torch.from_numpy(data.scale(raw)).float().view(len(rows), -1)

    def _count_tokens(self, batches: Sequence[Packed]) -> list[Packed]:
        """Return the batches with the response tokens of their complete optimizer step, over all ranks."""
        per_step = self.plan.turns(self.ranks.world)
        own = [0 if batch.padding else len(batch.target) for batch in batches]
        sums = [sum(own[at : at + per_step]) for at in range(0, len(own), per_step)]
        counts = torch.tensor(sums, dtype=torch.float64)
        if self.ranks.world > 1:
            counts = counts.to(self.module.device)
            torch.distributed.all_reduce(counts)
        totals = counts.tolist()
        return [replace(batch, global_tokens=totals[i // per_step]) for i, batch in enumerate(batches)]

    def _annotate(self, batch: Packed) -> Packed:
        """Return the batch with what the loss requires of the reference and of the sampling policy."""
        reference = self.data.annotator.reference
        for provider in self.providers:
            batch = provider.at_rollout(batch, self.module.policy, reference)
        return batch

    def _record(
        self, micro_batches: Sequence[MicroBatch], ends: list[int], rewards: torch.Tensor, responses: SampledTokens
    ) -> None:
        """Record reward, length and truncation of the rollout. Padding is not counted: another rank trains on it."""
        is_finished = self.data.annotator.chat.is_finished
        measured = [
            (reward, len(tokens) - is_finished(tokens), is_finished(tokens))
            for micro_batch, begin, end in zip(micro_batches, ends, ends[1:], strict=False)
            if not micro_batch.padding
            for reward, tokens in zip(rewards[begin:end].flatten().tolist(), chain(*responses[begin:end]), strict=True)
        ]
        reward, length, finished = torch.tensor(measured, dtype=torch.float64).view(-1, 3).sum(0).tolist()
        count = float(len(measured))
        self.module.record(
            {
                "rollout/reward": Mean(reward, count),
                "rollout/length": Mean(length, count),
                "rollout/truncated": Mean(count - finished, count),
            }
        )
