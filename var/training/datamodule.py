"""AlignmentData: rows → responses → sequences → annotations → plan → packed micro-batches."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning
import numpy as np
import torch

from var.annotate.annotator import Annotator, add_responses
from var.data.plan import ABSENT, Plan, Share, draw, make_plan
from var.data.rows import Rows, Source, read
from var.data.sequences import Sequences, choose, encode, needs_rewards
from var.data.settings import DataSettings
from var.data.split import split
from var.models.attention import check_lengths
from var.models.packing import Packed, pack, whole
from var.requirements import Need
from var.rewards.base import Triples, check_answers, check_scores
from var.rewards.scale import Scale
from var.sampling.base import Sampling
from var.sampling.local import Transformers
from var.training.loader import PlanLoader
from var.training.rollout import RolloutLoader
from var.utils.console import say
from var.utils.distributed import Ranks
from var.utils.errors import Problems, UserError
from var.utils.provenance import hash_content
from var.weights.estimators import log_mean
from var.weights.groups import within_prompt_std, zero_variance
from var.weights.health import health
from var.weights.table import Table


class AlignmentData(lightning.LightningDataModule):
    """Brings a loss what it needs. `prepare` (or Lightning's setup) does all of it; `facts` says what was found.

    live: the module runs the reference itself in each step; nothing of it is stored, and the batch carries rewards
    in place of weights that depend on it.
    """

    def __init__(
        self,
        source: Source,
        settings: DataSettings,
        loss: Any,
        annotator: Annotator,
        sampling: Sampling,
        scale: Scale,
        live: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.settings, self.loss = source, settings, loss
        self.annotator, self.sampling, self.scale, self.live = annotator, sampling, scale, live
        self.facts: dict[str, Any] = {}
        self.seconds = self.seconds_of_rollouts = 0.0
        self.plan: Plan
        self.content = ""  # a hash of what trains
        self.validation_pairs: Sequences | None = None
        self._columns: dict[str, Any] = {}
        self._start = (0, 0)
        self._ready = False

    def setup(self, stage: str | None = None) -> None:
        self.annotator.ranks = Ranks.current()
        self.prepare()

    def prepare(self) -> None:
        """Everything up to the plan and the weights; what is missing in the store is computed."""
        if self._ready:
            return
        begun = time.perf_counter()
        needs = self.loss.needs
        asked = needs & {Need.REWARDS, Need.ADVANTAGES} and Need.ROLLOUT not in needs
        if self.scale.kind == "zscore" and not asked:
            raise UserError(
                "reward_scale=zscore takes its moments from training rewards, which this loss asks for none"
            )
        self.annotator.check()
        self.rows = self._rows(needs)
        if Need.ROLLOUT in needs:
            self._plan_prompts()
        else:
            self._annotate(needs)
            self.annotator.reference.release()
        self.seconds = time.perf_counter() - begun
        self._ready = True

    def _annotate(self, needs: frozenset[Need]) -> None:
        """What an offline loss trains on: sequences, their plan, and the columns that the loss needs."""
        if self.live and not needs & {Need.REFERENCE_LOGPS, Need.CROSS_LOGPS}:
            raise UserError("this loss asks nothing of the reference in a step, so reference=live does nothing here")
        self.sequences = self._sequences(needs)
        self._refuse_longer((self.sequences.start + self.sequences.length).max(), "sequence")
        rewards = self._rewards() if Need.REWARDS in needs or Need.ADVANTAGES in needs else None
        weights = self._own_weights(needs, rewards)
        train = np.arange(len(self.sequences))
        if weights is not None and Need.WEIGHT_COLUMN not in needs:
            train = np.flatnonzero(weights.numpy() > 0)
        if Need.ADVANTAGES in needs:
            train = self._advantages(rewards)
        self._make_plan(needs, train)
        if needs & {Need.CROSS_LOGPS, Need.MISMATCHED_LOGPS}:
            present = self.members != ABSENT
            prompt, response = (
                np.where(present, part[self.members], 0).max(1)
                for part in (self.sequences.start, self.sequences.length)
            )
            self._refuse_longer((prompt + response).max(), "prompt with a response of its micro-batch")
        if Need.CROSS_REWARDS in needs:
            weights = self._planned_weights(needs, rewards)
        elif Need.REFERENCE_LOGPS in needs and not self.live:
            self._columns["reference_logps"] = self.annotator.reference_logps(self.sequences, self.shares_prompts)
        if Need.MISMATCHED_LOGPS in needs:
            if (self.plan.sequences < 2).any():
                raise UserError(
                    "this loss pairs each prompt with its neighbour's response: data.micro_batch is ≥ 2, and a short "
                    "one of a single row is dropped (data.last_micro_batch=drop)"
                )
            if not self.live:
                self._columns["mismatched"] = self.annotator.mismatched_logps(self.sequences, self.members)
        if Need.DESIRABLE in needs:
            self._columns["desirable"] = self._desirable(rewards)
        if rewards is not None:
            self._columns["rewards"] = rewards
        if weights is not None:
            self._columns["weights"] = weights
        self._report(rewards, weights)

    def _rows(self, needs: frozenset[Need]) -> Rows:
        """Training rows, with responses; `validation` are the rows of the held-out prompts, `development` those that
        a value estimate is fitted on."""
        settings = self.settings
        develop = self.loss.value.development_prompts if Need.ADVANTAGES in needs else 0
        rows = read(self.source, self.annotator.cache)
        self.facts["rows"] = len(rows)
        if rows.left_out:
            self.facts["rows left out by the adapter"] = rows.left_out
        if settings.limit is not None and settings.limit < len(rows):
            self.facts["rows beyond data.limit"] = len(rows) - settings.limit
        rows = rows.head(settings.limit)
        if needs & {Need.REWARDS, Need.ADVANTAGES, Need.CROSS_REWARDS}:
            check_answers(self.annotator.reward, rows)
        self.validation, self.development, train = split(rows, settings, develop)
        if develop:
            self.facts["prompts set apart for the value estimate"] = develop
        given = unanswered = 0
        for row in train:
            given += len(row.responses) > 0
            unanswered += not row.responses and row.sampling is not None  # by sample.py: all its answers were empty
        if unanswered and given:
            self.facts["prompts without an answer"] = unanswered
        if Need.ROLLOUT in needs or settings.responses == "sampled":
            if given:
                self.facts["rows whose own responses are not used"] = given
        elif 0 < given < len(train) - unanswered:
            raise UserError("some rows have responses and some have none; a data set is one or the other")
        if Need.ROLLOUT not in needs and (settings.responses == "sampled" or not given):
            texts = self.annotator.sampled(train, self.sampling)
            train, counts = add_responses(train, texts, self.annotator.cache)
            self.facts.update({name: count for name, count in counts.items() if count})
        return train

    def _sequences(self, needs: frozenset[Need]) -> Sequences:
        settings = self.settings
        pairs = Need.PAIRS in needs
        # of a pair, the better one is desirable; a threshold on the reward needs no pairs
        both = pairs or (Need.DESIRABLE in needs and self.loss.threshold is None)
        responses = settings.responses
        if responses == "auto" or responses == "sampled":
            responses = "both" if both else "all"
        elif both and responses != "both":
            raise UserError(f"this loss compares pairs, and data.responses={responses} makes none; set both or auto")
        rewards = None
        if needs_rewards(self.rows, responses):
            rewards = self.annotator.row_rewards(self.rows)
        choice = choose(self.rows, responses, rewards)
        if both and not pairs and not len(choice.row):
            raise UserError(
                "this loss takes the better of a row's two responses as desirable, and no row has two: for single ones "
                "set loss.threshold, the reward above which a response is desirable"
            )
        self.facts["responses"] = responses
        self._better = choice.row[0::2], choice.response[0::2]
        cache = self.annotator.cache
        if Need.SCALAR_HEAD in needs and len(self.validation):
            self.validation_pairs = self._validation_pairs()
        return encode(self.rows, choice, self.annotator.chat, settings.max_length, settings.overlong, pairs, cache)

    def _refuse_longer(self, longest: int, what: str) -> None:
        pretrained = self.annotator.reference.pretrained
        check_lengths(pretrained.config, pretrained.attention, int(longest), what)

    def _validation_pairs(self) -> Sequences | None:
        """Pairs of the held-out rows, for a reward model's accuracy; None where they have none."""
        settings, annotator, rows = self.settings, self.annotator, self.validation
        if not len(rows[0].responses):
            rows = add_responses(rows, annotator.sampled(rows, self.sampling), annotator.cache)[0]
        rewards = annotator.row_rewards(rows) if needs_rewards(rows, "both") else None
        choice = choose(rows, "both", rewards)
        if not len(choice.row):
            return None
        return encode(rows, choice, annotator.chat, settings.max_length, settings.overlong, True, annotator.cache)

    def _desirable(self, rewards: torch.Tensor | None) -> torch.Tensor:
        """[n] bool: by a threshold on the reward, or the better one of a pair."""
        if self.loss.threshold is not None:
            assert rewards is not None
            out = rewards > self.loss.threshold
        else:
            better = set(zip(*(part.tolist() for part in self._better), strict=True))
            both = zip(self.sequences.row.tolist(), self.sequences.table["response"], strict=True)
            out = torch.tensor([pair in better for pair in both])
        self.facts["desirable sequences"] = int(out.sum())
        return out

    def _advantages(self, rewards: torch.Tensor | None) -> np.ndarray:
        """Brings the column of r − V(x); returns the sequences that train, which A-LoL draws by it."""
        assert rewards is not None
        head, annotator = self.loss.value, self.annotator
        values = annotator.values(head, self.development, self.sequences, self.sampling, self.scale)
        advantages = rewards - torch.tensor(values, dtype=torch.float64)[torch.from_numpy(self.sequences.group)]
        self._columns["advantages"] = advantages
        train = draw(advantages.numpy(), self.loss.draw, self.settings.seed)
        self.facts["advantages"] = {
            "positive": float((advantages > 0).double().mean()), "mean": float(advantages.mean()),
            "drawn": len(train), "distinct": len(np.unique(train)),
        }  # fmt: skip
        return train

    def _plan_prompts(self) -> None:
        """What an online loss trains on: a plan over prompts; their responses come while the policy trains."""
        if not self.annotator.reward.scores_text:
            raise UserError(
                "an online loss rewards new text, and reward=score reads only the data's own; choose another"
            )
        if not isinstance(self.annotator.sampler, Transformers):
            raise UserError("an online loss samples from the policy as it trains: leave sampler at transformers")
        if self.sampling.temperature != 1 or self.sampling.top_p != 1:
            raise UserError(
                "an online loss takes its ratios and its KL to the policy that sampled: generate.temperature and "
                "generate.top_p are 1"
            )
        settings = self.settings
        if self.live:
            raise UserError("an online loss runs its reference beside each rollout; reference=live does nothing here")
        if settings.responses not in ("auto", "sampled"):
            raise UserError(f"an online loss samples its own answers; data.responses={settings.responses} does nothing")
        prompts = self._fitting(np.sort(np.unique(self.rows.keys, return_index=True)[1]))
        size = np.full(len(prompts), self.sampling.responses)
        # not the table's fingerprint: that is of the cache's file, its place and its time
        self.content = hash_content(self.rows.keys.tobytes().hex(), self.rows.table["answer"][:]).hex()[:16]
        self.plan = make_plan(
            size, size, settings.micro_batch, settings.global_batch, settings.seed,
            settings.last_micro_batch, settings.last_step, self.content,
        )  # fmt: skip
        self.members = np.where(self.plan.micro == ABSENT, ABSENT, prompts[self.plan.micro])
        if len(self.plan.micro) % self.plan.window and self.loss.rollout.passes > 1:
            raise UserError("with loss.rollout.passes above 1 every step must be whole: set data.last_step=drop")
        self.facts["prompts"] = len(prompts)
        if self.plan.dropped:
            self.facts["prompts dropped with the last micro-batch or step"] = self.plan.dropped
        self._report_plan()

    def _fitting(self, prompts: np.ndarray) -> np.ndarray:
        """The rows whose prompt leaves room for a whole answer within data.max_length; the others as overlong says."""
        chat, settings, room = self.annotator.chat, self.settings, self.sampling.max_new_tokens
        length = np.array([len(chat.prompt(self.rows[i].prompt)) for i in prompts.tolist()])
        fits = length + room <= settings.max_length
        if settings.overlong != "drop":  # a prompt is never cut
            problems = Problems("prompts that leave no room for an answer")
            for i in prompts[~fits].tolist():
                problems.add(f"row {self.rows[i].id}", f"and {room} new tokens exceed data.max_length")
            problems.check("Set data.overlong=drop to leave them out, or raise data.max_length.")
        if not fits.all():
            self.facts["prompts dropped as overlong"] = int((~fits).sum())
        if not fits.any():
            raise UserError(f"no prompt leaves room for generate.max_new_tokens={room} within data.max_length")
        self._refuse_longer(length[fits].max() + room, "prompt with its answer")
        return prompts[fits]

    def _rewards(self) -> torch.Tensor:
        """[n] float64, on the run's scale."""
        reward, sequences = self.annotator.reward, self.sequences
        if reward.scores_text:
            response = np.array(sequences.table["response"])
            raw = self.annotator.score(Triples(self.rows, sequences.row, sequences.row, response))
        else:
            raw = sequences.column("score")
            check_scores(sequences.tokens(i)[2] for i in np.flatnonzero(np.isnan(raw)).tolist())
        self.scale = self.scale.fit(raw)
        self.facts["reward"] = {"mean": float(raw.mean()), "sd": float(raw.std()), "scale": self.scale.describe()}
        scaled = np.array(self.scale(raw))
        if getattr(self.loss, "rewards_weigh", False) and len(negative := np.flatnonzero(scaled < 0)):
            lowest = int(scaled.argmin())
            raise UserError(
                f"this loss weighs responses by their rewards, and {len(negative)} of {len(scaled)} are negative, the "
                f"lowest {scaled[lowest]:.4g} of row {sequences.tokens(lowest)[2]}; set reward_scale=sigmoid"
            )
        return torch.from_numpy(scaled)

    def _own_weights(self, needs: frozenset[Need], rewards: torch.Tensor | None) -> torch.Tensor | None:
        """[n] weights that need no plan: the data's column, or an estimator over the own rewards; else None."""
        if Need.WEIGHT_COLUMN in needs:
            column = self.sequences.column("weight")
            if np.isnan(column).any():
                raise UserError("loss=weighted reads a weight with each response; some of this data's have none")
            return torch.from_numpy(column)
        if not hasattr(self.loss, "weights") or self.loss.estimator.planned:
            return None
        columns: dict[str, Any] = {}
        if Need.PROMPT_FEATURES in needs:
            columns["features"] = torch.from_numpy(self.annotator.features(self.sequences))
        if Need.CANDIDATE_REWARDS in needs:
            columns["candidates"] = torch.from_numpy(self._candidates())
        weights: torch.Tensor = self.loss.weights(self._table(rewards, **columns))
        self._count_left_out(rewards, weights.numpy() > 0)
        return weights

    def _candidates(self) -> np.ndarray:
        """[G, K] rewards, on the run's scale, of K responses of the reference to each group's prompt."""
        estimator, sampling = self.loss.estimator, self.sampling
        if estimator.seed == sampling.seed:
            raise UserError("loss.estimator.seed is generate.seed: the candidates would be the data's own answers")
        sampling = replace(sampling, responses=estimator.candidates, seed=estimator.seed)
        rows = self.rows.select(self.sequences.row[self.sequences.first])
        return self.scale(self.annotator.candidates(rows, sampling))

    def _make_plan(self, needs: frozenset[Need], train: np.ndarray) -> None:
        """`plan` of the sequences `train`, and `members` [M, W]: the sequences of each micro-batch, or ABSENT."""
        settings, sequences = self.settings, self.sequences
        if Need.PAIRS in needs:
            units = train.reshape(-1, 2)
        elif Need.GROUPS in needs:
            units = stack_by_group(sequences.group[train], train)
        else:
            units = train[:, None]
        present = units != ABSENT
        tokens = np.where(present, sequences.length[units], 0).sum(1)
        work = np.where(present, sequences.start[units] + sequences.length[units], 0).sum(1)
        self.plan = make_plan(
            tokens, present.sum(1), settings.micro_batch, settings.global_batch, settings.seed,
            settings.last_micro_batch, settings.last_step, sequences.content, work,
        )  # fmt: skip
        if self.plan.dropped:
            self.facts["sequences dropped with the last micro-batch or step"] = int(
                present.sum() - self.plan.sequences.sum()
            )
        micro = self.plan.micro[..., None]
        self.members = np.where(micro == ABSENT, ABSENT, units[self.plan.micro]).reshape(len(self.plan.micro), -1)
        self.content = sequences.content

    def _planned_weights(self, needs: frozenset[Need], rewards: torch.Tensor | None) -> torch.Tensor:
        """[n] weights of an in-batch estimator, whose micro-batches are the plan's."""
        annotator, sequences = self.annotator, self.sequences
        columns: dict[str, Any] = {"micro": torch.from_numpy(self.members)}
        if Need.REFERENCE_LOGPS in needs:
            logps = annotator.reference_logps(sequences, self.shares_prompts)
            flat = logps.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
            sums = np.add.reduceat(flat, np.cumsum(sequences.length) - sequences.length)
            columns["reference_logps"] = torch.from_numpy(sums)
        raw = annotator.cross_rewards(self.rows, sequences, self.members)
        columns["cross_rewards"] = torch.from_numpy(self.scale(raw))
        if Need.CROSS_LOGPS in needs:
            columns["cross_logps"] = torch.from_numpy(annotator.cross_logps(sequences, self.members))
        table = self._table(rewards, **columns)
        weights: torch.Tensor = self.loss.weights(table)
        if self.live:  # the module makes the weights of a step itself, and divides by the same mean
            self.temperature = self.loss.scaled_temperature(table)
            self.log_mean_weight = float(log_mean(self.loss.estimator(table, self.temperature)))
            self._columns["cross_rewards"] = table.cross_rewards
        return weights

    def _table(self, rewards: torch.Tensor | None, **columns: Any) -> Table:
        assert rewards is not None
        group, length = torch.from_numpy(self.sequences.group), torch.from_numpy(self.sequences.length)
        return Table(rewards=rewards, group=group, length=length, **columns)

    def _count_left_out(self, rewards: torch.Tensor | None, keep: np.ndarray) -> None:
        if keep.all():
            return
        silent = zero_variance(self._table(rewards)).numpy()
        groups = np.unique(self.sequences.group[~keep & silent])
        self.facts["groups without signal, left out"] = len(groups)
        self.facts["sequences left out with them"] = int((~keep & silent).sum())
        if (~keep & ~silent).any():
            what = "under loss.min_weight" if self.loss.min_weight else "whose weight is 0 beside the largest"
            self.facts[f"sequences left out {what}"] = int((~keep & ~silent).sum())
        if not keep.any() and not silent.all():
            raise UserError(f"no weight reaches loss.min_weight={self.loss.min_weight}; lower it or raise λ")
        if not keep.any():
            raise UserError(
                "every group's rewards are all equal, so nothing tells a good answer from a bad one; sample more "
                "responses a prompt (generate.responses), take other prompts or another reward"
            )

    def _report(self, rewards: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        sequences, facts = self.sequences, self.facts
        facts["sequences"] = len(sequences)
        facts["sequences that end with the end token"] = sequences.ended
        facts.update(sequences.counts)
        if rewards is not None:
            table = self._table(rewards)
            facts["reward"]["within_prompt_sd"] = within_prompt_std(rewards, table.group)
            facts["groups"] = len(sequences.first)
            facts["groups without signal"] = int(zero_variance(table)[sequences.first].sum())
        if weights is not None:
            used = np.unique(self.members[self.members >= 0])
            facts["weights"] = health(weights[used], torch.from_numpy(sequences.length[used]))._asdict()
        self._report_plan()

    def _report_plan(self) -> None:
        facts = self.facts
        facts["micro_batches"], facts["steps_per_epoch"] = len(self.plan.micro), self.plan.steps
        facts["plan"] = self.plan.hash
        for name, value in facts.items():
            shown = (
                {k: round(v, 4) if isinstance(v, float) else v for k, v in value.items()}
                if isinstance(value, dict)
                else value
            )
            say(f"  {name.replace('_', ' ')}: {shown}")

    @property
    def shares_prompts(self) -> bool:
        """Whether answers to one prompt always stand side by side, so that it can be read once for all of them."""
        return bool(self.loss.needs & {Need.PAIRS, Need.GROUPS})

    def batch(self, share: Share) -> Packed:
        """A micro-batch of the plan, with the divisors of its whole optimiser step."""
        members = self.members[share.micro_batch]
        members = members[members >= 0]
        ids, starts, names = zip(*(self.sequences.tokens(i) for i in members.tolist()), strict=True)
        extra: dict[str, Any] = {}
        for name in ("weights", "rewards", "advantages"):
            if name in self._columns:
                extra[name] = self._columns[name][members].float()
        if "desirable" in self._columns:
            extra["desirable"] = self._columns["desirable"][members]
        if "cross_rewards" in self._columns:
            extra["cross_rewards"] = self._columns["cross_rewards"][
                share.micro_batch, : len(members), : len(members)
            ].float()
        if "mismatched" in self._columns:
            extra["mismatched_reference_logps"] = self._columns["mismatched"][share.micro_batch, : len(members)].float()
        if "reference_logps" in self._columns:
            column = self._columns["reference_logps"]
            extra["reference_logps"] = torch.tensor([x for i in members for x in column[int(i)].as_py()])
        group = np.unique(self.sequences.group[members], return_inverse=True)[1].tolist()
        divisors: dict[str, Any] = {
            "global_tokens": share.tokens, "global_sequences": share.sequences, "global_groups": share.units,
        }  # fmt: skip
        if Need.SCALAR_HEAD in self.loss.needs:
            ids = tuple(map(self.annotator.chat.complete, ids))
            return whole(ids, names, group, **divisors, **extra)
        return pack(ids, starts, names, group, self.shares_prompts, **divisors, **extra)

    @property
    def rows_of_members(self) -> np.ndarray:
        """The row of each thing that `members` counts: sequences, or, online, the rows themselves."""
        return np.arange(len(self.rows)) if Need.ROLLOUT in self.loss.needs else self.sequences.row

    @property
    def weights(self) -> np.ndarray | None:
        """[n] of the sequences that `members` counts; None where the loss takes none from the data module."""
        return self._columns["weights"].numpy() if "weights" in self._columns else None

    def records(self, micro_batches: int) -> Iterator[dict[str, Any]]:
        """The first micro-batches for a reader: of each thing in them its prompt and, offline, response, weight and
        reward."""
        for m, members in enumerate(self.members[:micro_batches]):
            for i in members[members >= 0].tolist():
                row = self.rows[int(self.rows_of_members[i])]
                record: dict[str, Any] = {"micro_batch": m, "id": row.id, "prompt": list(row.prompt)}
                if Need.ROLLOUT not in self.loss.needs:
                    record["response"] = row.responses[self.sequences.table[i]["response"]].text
                for name in ("weights", "rewards"):
                    if name in self._columns:
                        record[name.removesuffix("s")] = float(self._columns[name][i])
                yield record

    def train_dataloader(self) -> "PlanLoader | RolloutLoader":
        ranks = Ranks.current()
        if Need.ROLLOUT in self.loss.needs:
            return RolloutLoader(self, ranks)
        return PlanLoader(self, ranks)

    def transfer_batch_to_device(self, batch: Packed, device: torch.device, dataloader_idx: int) -> Packed:
        """Without waiting, where the batch is pinned; Lightning does so for tensors alone."""
        return batch.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The plan's hash, and the position in it in this rank's micro-batches: resuming is an index into it."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        weights = self.annotator.reference.pretrained.weights
        epoch, ranks = self.trainer.current_epoch, self.trainer.world_size
        return {"plan": self.plan.hash, "weights": weights, "epoch": epoch, "position": progress, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["plan"] != self.plan.hash:
            raise UserError(
                f"the checkpoint was made with plan {state['plan']} and this configuration makes {self.plan.hash}: "
                "other data, order, micro-batch or length. Resume with the same data, or start anew with resume=false"
            )
        if state["weights"] != (weights := self.annotator.reference.pretrained.weights):
            raise UserError(
                f"the checkpoint goes on from weights {state['weights']} and model.path holds {weights}: the reference "
                "would be another. Put the model back, or start anew with resume=false"
            )
        assert self.trainer is not None
        self._start = (state["epoch"], state["position"] * state["ranks"] // self.trainer.world_size)

    def position(self, length: int) -> tuple[int, int]:
        """The epoch, and the micro-batch of it from which a loader of so many goes on; asked once an epoch."""
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        at, position = self._start
        self._start = (0, 0)
        return epoch, position if at == epoch and position < length else 0


def stack_by_group(group: np.ndarray, members: np.ndarray) -> np.ndarray:
    """[G, K] the members of each group, side by side, ABSENT where a group has fewer than the largest."""
    order = np.argsort(group, kind="stable")
    _, start, count = np.unique(group[order], return_index=True, return_counts=True)
    out = np.full((len(count), count.max()), ABSENT)
    place = np.arange(len(order)) - np.repeat(start, count)
    out[np.repeat(np.arange(len(count)), count), place] = members[order]
    return out
