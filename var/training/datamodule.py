"""AlignmentData: rows → sequences → requirements → plan → micro-batches."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch

from var.annotate.annotator import Annotator
from var.annotate.base import TrainingSet, make_providers, unit_of
from var.annotate.responses import add_responses, sample_responses
from var.annotate.rewards import score_rows
from var.annotate.rollouts import ProvideRollout
from var.data.choice import Selection, choose, needs_rewards
from var.data.degenerate import count_degenerate, warn_of_degenerate
from var.data.plan import ABSENT, MicroBatch, count_dropped, make_plan, stack_by_group
from var.data.read import Source, read
from var.data.settings import DataSettings
from var.data.split import draw, split
from var.losses.base import Loss
from var.models.packing import Packed, pack, whole
from var.requirements import Rewards, Rollout, SequenceScores, TokenValues, find
from var.rewards.base import release
from var.rewards.scale import Scale
from var.sampling.base import Sampling
from var.training import resume
from var.training.loader import PlanLoader
from var.training.rollout import RolloutLoader
from var.utils.console import say, warn
from var.utils.distributed import Ranks
from var.utils.errors import UserError
from var.weights.health import weight_health

PACKED_FIELDS = {field.name for field in dataclasses.fields(Packed)}


class AlignmentData(lightning.LightningDataModule):
    """Prepares what a loss requires and serves it in micro-batches.

    `prepare` (or Lightning's `setup`) makes the plan, and computes or reads the annotations. Each requirement of the
    loss is provided by a class of `var/annotate/`; nothing else of the loss is read here.
    """

    def __init__(
        self,
        source: Source,
        settings: DataSettings,
        loss: Loss,
        annotator: Annotator,
        sampling: Sampling,
        scale: Scale,
        live: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.settings = source, settings
        self.requirements = loss.requires
        self.providers = make_providers(self.requirements)
        self.rollout = find(self.requirements, Rollout)
        self.training_set = TrainingSet(annotator, sampling, scale, settings, live, unit_of(self.providers))
        self.report = self.training_set.report
        self.seconds = 0.0
        self.fingerprint = ""
        """A hash of what trains."""
        self._rollouts: RolloutLoader | None = None
        self.saved: dict[str, Any] | None = None
        """The state in the checkpoint that the run resumes from."""
        self._start = (0, 0)
        self._have_responses: bool | None = None
        """Whether the rows' own responses train; None before the rows are read."""
        self._ready = False

    @property
    def annotator(self) -> Annotator:
        """Computes numbers or reads them from the cache."""
        return self.training_set.annotator

    @property
    def seconds_of_rollouts(self) -> float:
        """Seconds spent on rollouts during training."""
        return self._rollouts.seconds if self._rollouts else 0.0

    def setup(self, stage: str | None = None) -> None:
        """Prepare, on all ranks together."""
        self.annotator.ranks = Ranks.current()
        self.prepare()

    def prepare(self) -> None:
        """Do everything up to the plan and the annotations. Missing annotations are computed."""
        if self._ready:
            return
        started = time.perf_counter()
        data = self.training_set
        if data.scale.kind == "zscore" and (self.rollout or not find(self.requirements, Rewards)):
            raise UserError(
                "reward_scale=zscore is fitted to rewards of the training responses before training, and this loss has "
                "none then. Set reward_scale=raw or sigmoid."
            )
        self.read_rows()
        self.annotator.check()
        resume.check_same_weights(self.saved, self.annotator.reference.pretrained)
        if not self.rollout and not self._have_responses:
            samples = sample_responses(self.annotator, data.rows, data.sampling)
            data.rows = add_responses(data.rows, samples, self.annotator.chat, self.annotator.cache, self.report)
        if self.rollout:
            next(provider for provider in self.providers if isinstance(provider, ProvideRollout)).plan_prompts(data)
            resume.check_same_data(self.saved, data.plan, data.rows)
            self.fingerprint = data.plan.fingerprint
        else:
            self._annotate()
            self.annotator.reference.release()
            release(self.annotator.reward)
        report, plan = self.report, data.plan
        report.micro_batches, report.steps_per_epoch, report.plan = len(plan.micro), plan.steps, plan.hash
        report.show(say)
        self.seconds = time.perf_counter() - started
        self._ready = True

    @property
    def has_rows(self) -> bool:
        """Whether the rows have been read."""
        return self._have_responses is not None

    @property
    def samples_responses(self) -> bool:
        """Whether responses are sampled before training, as far as it is known before the rows are read."""
        known = not self._have_responses if self.has_rows else self.settings.responses == "sampled"
        return known and not self.rollout

    def read_rows(self) -> None:
        """Read, check and split the rows. Commands call it before they load a model."""
        if self.has_rows:
            return
        data, settings, report = self.training_set, self.settings, self.report
        self.annotator.check_folders()
        rows = read(self.source, self.annotator.cache)
        if rows.description:
            say(f"Data: {rows.description}")
        report.rows, report.records_skipped = len(rows), rows.left_out or None
        report.records_joined = rows.merged or None
        used = draw(rows, settings)
        unused = len(rows) - len(used) or None
        report.rows_beyond_limit, report.rows_not_drawn = (unused, None) if settings.limit else (None, unused)
        rows = used
        self.annotator.check_rows(rows)
        for provider in self.providers:
            provider.check_rows(data, rows)
        development = max((provider.development_prompts for provider in self.providers), default=0)
        report.development_prompts = development or None
        data.validation, data.development, data.rows = split(rows, settings, development)
        empty = data.rows.facts["responses"] == 0
        with_responses = len(data.rows) - int(empty.sum())
        without_answer = int((empty & data.rows.facts["sampled"]).sum())  # all its sampled responses were empty
        if without_answer and with_responses:
            report.rows_with_only_empty_responses = without_answer
        if self.rollout or settings.responses == "sampled":
            report.rows_with_unused_responses = with_responses or None
        elif 0 < with_responses < len(data.rows) - without_answer:
            raise UserError(
                f"{with_responses} of {len(data.rows)} training rows have responses and the others have none. Add the "
                "missing ones, remove those rows, or set data.responses=sampled."
            )
        self._have_responses = settings.responses != "sampled" and with_responses > 0
        special = self.annotator.reference.pretrained.tokenizer.all_special_tokens
        report.degenerate = count_degenerate(data.rows, data.validation, special, not self._have_responses)
        warn_of_degenerate(report.degenerate, len(data.rows))
        if self.rollout and data.sampling.responses == 1 and not find(self.requirements, TokenValues):
            warn(
                "generate.responses=1: without a value head, a response is compared with the others to its prompt, so "
                "one response teaches nothing. Set generate.responses=4 or more."
            )

    def _annotate(self) -> None:
        """Encode the training responses, make the plan, and provide each requirement."""
        data = self.training_set
        if data.live and not any(requirement.reads_reference for requirement in self.requirements):
            raise UserError("reference=live has no effect with this loss: it does not use the reference in training")
        self._choose_responses()
        data.sequences = data.encode(data.rows, data.choice, pairs=data.unit == "pair")
        data.check_lengths((data.sequences.start + data.sequences.length).max(), "sequence")
        train = np.arange(len(data.sequences))
        for provider in self.providers:
            selected = provider.select(data)
            train = train if selected is None else selected[np.isin(selected, train)]
        report, sequences = self.report, data.sequences
        report.sequences, report.sequences_with_end_token = len(sequences), sequences.ended
        report.sequences_selected = len(train) if len(train) != len(sequences) else None
        report.encoding = sequences.counts
        if data.unit == "group":
            self._count_groups_of_one()
        self._make_plan(train)
        resume.check_same_data(self.saved, data.plan, data.rows)
        for provider in self.providers:
            provider.check_plan(data)
        for provider in self.providers:
            provider.compute(data)
        if data.weights is not None:
            used = np.unique(data.members[data.members >= 0])
            if not data.weights[used].any():
                raise UserError("the weights of all responses are 0, so nothing would train")
            length = torch.from_numpy(sequences.length[used])
            report.weights = weight_health(data.weights[used], length)._asdict()

    def _count_groups_of_one(self) -> None:
        """Count prompts with one response, and warn if they are many: nothing can be compared in them."""
        size = np.bincount(self.training_set.sequences.group)
        self.report.groups, self.report.groups_of_one = len(size), int((size == 1).sum()) or None
        if (size == 1).mean() > 0.1:
            warn(
                f"{(size == 1).sum()} of {len(size)} prompts have one response, and this loss compares the responses "
                "to a prompt. Add responses, set data.responses=sampled, or use a loss for single responses."
            )

    def tokenize(self) -> None:
        """Tokenize responses that the rows have, so that errors in them come before a model is loaded."""
        data = self.training_set
        if self._have_responses and not self.rollout and not needs_rewards(data.rows, self._selection):
            data.encode(data.rows, choose(data.rows, self._selection), pairs=data.unit == "pair")

    @property
    def _selection(self) -> Selection:
        """Which responses train."""
        responses, both = self.settings.responses, any(provider.both_responses for provider in self.providers)
        if responses == "auto" or responses == "sampled":
            return "both" if both else "all"
        if both and responses != "both":
            raise UserError(
                f"data.responses={responses}: this loss compares two responses of a row. Set data.responses to both or "
                "auto."
            )
        return responses

    def _choose_responses(self) -> None:
        """Decide which responses to train on."""
        data, responses = self.training_set, self._selection
        rewards = score_rows(self.annotator, data.rows) if needs_rewards(data.rows, responses) else None
        data.choice = choose(data.rows, responses, rewards)
        for provider in self.providers:
            provider.check_choice(data)
        self.report.responses = responses

    def _make_plan(self, train: np.ndarray) -> None:
        """Make the plan of the sequences `train`, and `members`, the sequences of each micro-batch."""
        data, settings, sequences = self.training_set, self.settings, self.training_set.sequences
        if data.unit == "pair":
            units = train.reshape(-1, 2)
        elif data.unit == "group":
            units = stack_by_group(sequences.group[train], train)
        else:
            units = train[:, None]
        present = units != ABSENT
        tokens = np.where(present, sequences.length[units], 0).sum(1)
        work = np.where(present, sequences.start[units] + sequences.length[units], 0).sum(1)
        try:
            data.plan = make_plan(
                tokens, present.sum(1), settings.micro_batch, settings.global_batch, settings.seed,
                settings.last_micro_batch, settings.last_step, sequences.content, work,
            )  # fmt: skip
        except UserError:
            self.report.show(say)  # it shows why so few sequences remain
            raise
        if data.plan.dropped:
            self.report.sequences_dropped_by_plan = count_dropped(data.plan, int(present.sum()))
        micro = data.plan.micro[..., None]
        data.members = np.where(micro == ABSENT, ABSENT, units[data.plan.micro]).reshape(len(data.plan.micro), -1)
        self.fingerprint = sequences.content

    def batch(self, micro_batch: MicroBatch) -> Packed:
        """Return a micro-batch of the plan, with the divisors of its optimizer step."""
        data = self.training_set
        members = data.members[micro_batch.number]
        members = members[members >= 0]
        ids, starts, names = zip(*(data.sequences.tokens(i) for i in members.tolist()), strict=True)
        fields: dict[str, Any] = {}
        for provider in self.providers:
            fields |= provider.batch_fields(data, micro_batch.number, members)
        extra = {name: fields.pop(name) for name in fields.keys() - PACKED_FIELDS}
        fields |= {**micro_batch.divisors, "extra": extra}
        group = np.unique(data.sequences.group[members], return_inverse=True)[1].tolist()
        if find(self.requirements, SequenceScores):
            return whole(list(map(self.annotator.chat.complete, ids)), names, group, **fields)
        return pack(ids, starts, names, group, data.shares_prompts, **fields)

    @property
    def rows_of_members(self) -> np.ndarray:
        """The row of each item that `members` counts: sequences or, in an online run, rows."""
        data = self.training_set
        return np.arange(len(data.rows)) if self.rollout else data.sequences.row

    def records(self, micro_batches: int) -> Iterator[dict[str, Any]]:
        """Yield a readable record per item of the first micro-batches; offline, with response, weight and reward."""
        data = self.training_set
        for m, members in enumerate(data.members[:micro_batches]):
            for i in members[members >= 0].tolist():
                row = data.rows[int(self.rows_of_members[i])]
                record: dict[str, Any] = {"micro_batch": m, "id": row.id, "prompt": list(row.prompt)}
                if not self.rollout:
                    record["response"] = row.responses[data.sequences.response[i]].text
                    ids, start, _ = data.sequences.tokens(i)
                    decode = self.annotator.chat.template.decode
                    record["trained"] = {"after": decode(ids[:start]), "tokens": decode(ids[start:])}
                for name, column in (("weight", data.weights), ("reward", data.rewards)):
                    if column is not None:
                        record[name] = float(column[i])
                yield record

    def train_dataloader(self) -> PlanLoader | RolloutLoader:
        """Return this rank's loader: of the plan's micro-batches, or of rollouts."""
        ranks = self.annotator.ranks
        if self.rollout:
            assert self.trainer is not None
            module: Any = self.trainer.lightning_module
            loader = RolloutLoader(self.training_set, self.providers, self.rollout, module, self.position, ranks)
            self._rollouts = loader
            return loader
        return PlanLoader(self.training_set.plan, self.batch, self.position, ranks)

    def transfer_batch_to_device(self, batch: Packed, device: torch.device, dataloader_idx: int) -> Packed:
        """Move a batch without waiting if it is pinned. Lightning does so only for tensors."""
        return batch.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Return hashes of what trains, and the position in the plan, in this rank's micro-batches."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        weights = self.annotator.reference.pretrained.weights
        epoch, ranks = self.trainer.current_epoch, self.trainer.world_size
        plan, labels = self.training_set.plan.hash, self.training_set.rows.labels
        return {
            "plan": plan, "labels": labels, "weights": weights, "epoch": epoch, "position": progress, "ranks": ranks,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the position of `state`."""
        self._start = (state["epoch"], self.convert_progress(state["position"], state["ranks"]))

    def convert_progress(self, count: int, ranks: int) -> int:
        """Return a rank's micro-batches so far, `count` on another number of ranks, as their number on this one."""
        assert self.trainer is not None
        passes = self.rollout.passes if self.rollout else 1
        return self.training_set.plan.convert_progress(count, ranks, self.trainer.world_size, passes)

    def position(self, length: int) -> tuple[int, int]:
        """Return the epoch and the micro-batch to start from, for a loader of this length. Call it once per epoch."""
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        at, position = self._start
        self._start = (0, 0)
        return epoch, position if at == epoch and position < length else 0
