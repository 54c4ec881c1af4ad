"""Rollouts: the policy answers prompts while it trains, and its answers, rewarded, are the next batches."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from var.data.plan import Share
from var.losses.base import Mean
from var.models.packing import Packed, pack
from var.models.policy import gather_parameters
from var.requirements import Need
from var.rewards.base import compute_scores
from var.sampling.local import sample_tokens
from var.utils.console import timed
from var.utils.distributed import Ranks
from var.utils.errors import UserError

if TYPE_CHECKING:
    from var.training.datamodule import AlignmentData


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """steps: optimiser steps whose prompts are answered at once, by the policy as it then is; more than 1 trains on
    answers of an older policy, sampled in larger batches. passes: how often each rollout is trained on.
    """

    steps: int = 1
    passes: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.passes < 1:
            raise UserError("loss.rollout: steps and passes are at least 1")


class RolloutLoader:
    """This rank's micro-batches, each made when it is asked for: prompts of the plan, answered by the policy as it is.

    A run that was resumed within a rollout samples that rollout anew, from the policy of the checkpoint.
    """

    def __init__(self, data: "AlignmentData", ranks: Ranks) -> None:
        self.data, self.ranks = data, ranks
        self.settings: Rollout = data.loss.rollout

    def __len__(self) -> int:
        return self.data.plan.length(self.ranks.world) * self.settings.passes

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own, as PlanLoader's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""

    def __iter__(self) -> Iterator[Packed]:
        epoch, begin = self.data.position(len(self))
        plan, world = self.data.plan, self.ranks.world
        shares = list(plan.batches(epoch, self.ranks.rank, world))
        per_step = plan.window // world
        size = per_step * self.settings.steps
        done = 0
        for at in range(0, len(shares), size):
            some = shares[at : at + size]
            coming = len(some) * self.settings.passes
            if done + coming > begin:
                seed = epoch * plan.steps + at // per_step  # of the step, whatever micro-batches and ranks it has
                batches = self.answered(some, seed) * self.settings.passes
                yield from batches[max(0, begin - done) :]
            done += coming

    @torch.no_grad()
    def answered(self, shares: Sequence[Share], seed: int) -> list[Packed]:
        """The micro-batches of several shares: prompts, K sampled responses each, rewards, and what the loss needs."""
        began = time.perf_counter()
        data = self.data
        assert data.trainer is not None
        module: Any = data.trainer.lightning_module
        chat, reference = data.annotator.chat, data.annotator.reference
        members = [data.members[share.micro_batch][data.members[share.micro_batch] >= 0] for share in shares]
        rows = [data.rows[int(i)] for some in members for i in some]
        prompts = [chat.prompt(row.prompt) for row in rows]
        sampling = replace(data.sampling, seed=data.sampling.seed + seed)
        seconds = data.annotator.seconds
        with reference.precision(), gather_parameters(module.policy), timed(seconds, "Sampling"):
            responses = sample_tokens(module.policy.model, chat, prompts, sampling)
        with timed(seconds, "Scoring"):
            rewards = self._rewards(rows, responses)
        ends = np.cumsum([0, *map(len, members)])
        packs = []
        for share, begin, end in zip(shares, ends, ends[1:], strict=False):
            ids, starts = [], []
            for prompt, several in zip(prompts[begin:end], responses[begin:end], strict=True):
                ids += [prompt + tokens + [chat.end_token] * finished for tokens, finished in several]
                starts += [len(prompt)] * len(several)
            group = np.repeat(np.arange(end - begin), sampling.responses).tolist()
            names = [rows[begin + g].id for g in group]
            batch = pack(ids, starts, names, group, share=True, rewards=rewards[begin:end].flatten())
            packs.append(replace(batch, global_sequences=share.sequences, global_groups=share.units))
        with timed(seconds, "Reference log-probabilities"):
            packs = [self._annotated(module, batch.to(module.device)) for batch in self._with_tokens(shares, packs)]
        real = [  # a filler's were counted where they train
            (reward, len(tokens), finished)
            for share, begin, end in zip(shares, ends, ends[1:], strict=False)
            if share.units < float("inf")
            for reward, (tokens, finished) in zip(
                rewards[begin:end].flatten().tolist(), chain(*responses[begin:end]), strict=True
            )
        ]
        total = torch.tensor(real, dtype=torch.float64, device=module.device).view(-1, 3).sum(0)
        number = float(len(real))
        module.record(
            {
                "rollout/reward": Mean(total[0], number),
                "rollout/length": Mean(total[1], number),
                "rollout/cut": Mean(number - total[2], number),
            }
        )
        data.seconds_of_rollouts += time.perf_counter() - began
        return packs

    def _rewards(self, rows: Sequence[Any], responses: Sequence[Sequence[tuple[list[int], bool]]]) -> torch.Tensor:
        """[P, K] on the run's scale."""
        data = self.data
        decode = data.annotator.chat.tokenizer.decode
        triples = [
            (row.prompt, decode(tokens, skip_special_tokens=True), row.answer)
            for row, several in zip(rows, responses, strict=True)
            for tokens, _ in several
        ]
        raw = compute_scores(data.annotator.reward, *map(list, zip(*triples, strict=True)))
        if not np.isfinite(raw).all():
            bad = int(np.flatnonzero(~np.isfinite(raw))[0])
            raise UserError(f"the reward of a sampled response is {raw[bad]}: {triples[bad][1][:60]!r}")
        return torch.from_numpy(data.scale(raw)).float().view(len(rows), -1)

    def _with_tokens(self, shares: Sequence[Share], packs: Sequence[Packed]) -> list[Packed]:
        """With the response tokens of each whole step, over the ranks; a filler's divisors stay infinite."""
        per_step = self.data.plan.window // self.ranks.world
        own = [len(pack.target) * (share.units < float("inf")) for pack, share in zip(packs, shares, strict=True)]
        sums = [sum(own[at : at + per_step]) for at in range(0, len(own), per_step)]
        counts = torch.tensor(sums, dtype=torch.float64)
        if self.ranks.world > 1:
            counts = counts.to(self.data.trainer.lightning_module.device)  # type: ignore[union-attr]
            torch.distributed.all_reduce(counts)
        totals = counts.tolist()
        return [
            replace(batch, global_tokens=totals[i // per_step] if share.units < float("inf") else float("inf"))
            for i, (batch, share) in enumerate(zip(packs, shares, strict=True))
        ]

    def _annotated(self, module: Any, batch: Packed) -> Packed:
        """With the log-probabilities of the reference, and of the policy that sampled where it will have moved."""
        needs, reference = self.data.loss.needs, self.data.annotator.reference
        with reference.precision():
            if Need.REFERENCE_LOGPS in needs:
                batch = replace(batch, reference_logps=reference.policy(batch))
            if Need.OLD_LOGPS in needs and (self.settings.steps > 1 or self.settings.passes > 1):
                sampled = module.policy(batch)
                if isinstance(sampled, tuple):
                    sampled, values = sampled
                    batch = replace(batch, old_values=values)
                batch = replace(batch, old_logps=sampled)
        return batch
