"""AlignmentData: rows → responses → sequences → annotations → plan → packed micro-batches."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import lightning
import numpy as np
import torch

from var.annotate.fill import Annotator, Ranks, Triples, with_responses
from var.data.plan import ABSENT, Plan, make_plan
from var.data.rows import Rows, Source, read
from var.data.sequences import Sequences, choose, encode, needs_rewards
from var.estimators import Table, health, uninformative, within_prompt_deviation
from var.generate import Sampling
from var.needs import Need
from var.packing import Packed, pack
from var.problems import Problems, UserError
from var.progress import say
from var.rewards.scale import Scale


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """conf/data/_base.yaml has the meaning of each."""

    responses: Literal["auto", "chosen", "both", "best", "all"]
    max_length: int
    overlong: Literal["drop", "cut", "error"]
    validation_prompts: int
    limit: int | None
    micro_batch: int
    global_batch: int
    short_micro_batch: Literal["drop", "keep", "error"]
    short_window: Literal["keep", "drop"]
    seed: int

    def __post_init__(self) -> None:
        problems = Problems("data settings")
        choices = {
            "responses": ("auto", "chosen", "both", "best", "all"),
            "overlong": ("drop", "cut", "error"),
            "short_micro_batch": ("drop", "keep", "error"),
            "short_window": ("keep", "drop"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.add(f"data.{name}", f"{getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in ("max_length", "micro_batch", "global_batch"):
            if getattr(self, name) < 1:
                problems.add(f"data.{name}", "must be at least 1")
        if self.micro_batch >= 1 and self.global_batch % self.micro_batch:
            problems.add("data.global_batch", f"{self.global_batch} is no multiple of micro_batch={self.micro_batch}")
        if self.validation_prompts < 0:
            problems.add("data.validation_prompts", "must be at least 0")
        problems.check()


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
        self.seconds = 0.0
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
        if self.scale.kind == "zscore" and Need.REWARDS not in needs:
            raise UserError(
                "reward_scale=zscore takes its moments from training rewards, which this loss asks for none"
            )
        self.annotator.check()
        self.rows = self._rows()
        self.sequences = self._sequences(needs)
        rewards = self._rewards() if Need.REWARDS in needs else None
        weights = self._own_weights(needs, rewards)
        keep = np.ones(len(self.sequences), dtype=bool)
        if weights is not None and Need.WEIGHT_COLUMN not in needs:
            keep = weights.numpy() > 0
        self._make_plan(2 if Need.PAIRS in needs else 1, keep)
        if Need.CROSS_REWARDS in needs:
            weights = self._planned_weights(needs, rewards)
        elif Need.REFERENCE_LOGPS in needs and not self.live:
            self._columns["reference_logps"] = self.annotator.reference_logps(self.sequences)
        if weights is not None:
            self._columns["weights"] = weights
        self._report(rewards, weights)
        self.annotator.reference.release()
        self.seconds = time.perf_counter() - begun
        self._ready = True

    def _rows(self) -> Rows:
        """Training rows, with responses; `validation` are the rows of the held-out prompts."""
        settings = self.settings
        rows = read(self.source, self.annotator.cache)
        self.facts["rows"] = len(rows)
        if rows.left_out:
            self.facts["rows left out by the adapter"] = rows.left_out
        if settings.limit is not None and settings.limit < len(rows):
            self.facts["rows beyond data.limit"] = len(rows) - settings.limit
            rows = rows.select(np.arange(settings.limit))
        prompts = np.unique(rows.keys)
        if settings.validation_prompts >= len(prompts):
            raise UserError(
                f"data.validation_prompts={settings.validation_prompts} holds out all of the {len(prompts)} distinct "
                "prompts; lower it"
            )
        held = np.random.default_rng(settings.seed).permutation(len(prompts))[: settings.validation_prompts]
        is_held = np.isin(rows.keys, prompts[held])
        first = np.unique(rows.keys, return_index=True)[1]
        self.validation = rows.select(np.sort(first[is_held[first]]))
        train = rows.select(np.flatnonzero(~is_held))
        if not len(train[0].responses):
            if any(len(row.responses) for row in train):
                raise UserError("some rows have responses and some have none; a data set is one or the other")
            texts = self.annotator.sampled(train, self.sampling)
            train, counts = with_responses(train, texts, self.annotator.cache)
            self.facts.update({name: count for name, count in counts.items() if count})
        return train

    def _sequences(self, needs: frozenset[Need]) -> Sequences:
        settings = self.settings
        pairs = Need.PAIRS in needs
        responses = settings.responses
        if responses == "auto":
            responses = "both" if pairs else "all"
        elif pairs and responses != "both":
            raise UserError(f"this loss compares pairs, and data.responses={responses} makes none; set both or auto")
        rewards = None
        if needs_rewards(self.rows, responses):
            rewards = self.annotator.row_rewards(self.rows)
        choice = choose(self.rows, responses, rewards)
        self.facts["responses"] = responses
        cache = self.annotator.cache
        return encode(self.rows, choice, self.annotator.chat, settings.max_length, settings.overlong, pairs, cache)

    def _rewards(self) -> torch.Tensor:
        """[n] float64, on the run's scale."""
        reward, sequences = self.annotator.reward, self.sequences
        if reward.scores_text:
            response = np.array(sequences.table["response"])
            raw = self.annotator.score(Triples(self.rows, sequences.row, sequences.row, response))
        else:
            raw = sequences.column("score")
            if np.isnan(raw).any():
                problems = Problems("reward=score, but the data carries no score")
                for i in np.flatnonzero(np.isnan(raw)).tolist():
                    problems.add(f"row {sequences.tokens(i)[2]}", "no score")
                problems.check("Choose a reward that scores text, as reward=offsetbias-rm-8b.")
        self.scale = self.scale.fitted(raw)
        self.facts["reward"] = {"mean": float(raw.mean()), "sd": float(raw.std()), "scale": self.scale.describe()}
        return torch.from_numpy(np.array(self.scale(raw)))

    def _own_weights(self, needs: frozenset[Need], rewards: torch.Tensor | None) -> torch.Tensor | None:
        """[n] weights that need no plan: the data's column, or an estimator over the own rewards; else None."""
        if Need.WEIGHT_COLUMN in needs:
            column = self.sequences.column("weight")
            if np.isnan(column).any():
                raise UserError("loss=weighted reads a weight with each response; some of this data's have none")
            return torch.from_numpy(column)
        if not hasattr(self.loss, "weights") or self.loss.estimator.planned:
            return None
        features = None
        if Need.PROMPT_FEATURES in needs:
            features = torch.from_numpy(self.annotator.features(self.sequences))
        weights: torch.Tensor = self.loss.weights(self._table(rewards, features=features))
        self._count_left_out(rewards, weights.numpy() > 0)
        return weights

    def _make_plan(self, unit: int, keep: np.ndarray) -> None:
        """`plan` of the sequences [n] that train, and `members` [M, B·unit]: the sequences of each micro-batch."""
        settings, kept = self.settings, np.flatnonzero(keep)
        tokens = self.sequences.length[kept].reshape(-1, unit).sum(1)
        self.plan: Plan = make_plan(
            tokens, unit, settings.micro_batch, settings.global_batch, settings.seed,
            settings.short_micro_batch, settings.short_window, self.sequences.content,
        )  # fmt: skip
        if self.plan.dropped:
            self.facts["sequences dropped with the last micro-batch or step"] = self.plan.dropped * unit
        units = self.plan.micro[..., None]
        places = np.where(units == ABSENT, 0, units * unit + np.arange(unit))
        self.members = np.where(units == ABSENT, ABSENT, kept[places]).reshape(len(self.plan.micro), -1)

    def _planned_weights(self, needs: frozenset[Need], rewards: torch.Tensor | None) -> torch.Tensor:
        """[n] weights of an in-batch estimator, whose micro-batches are the plan's."""
        annotator, sequences = self.annotator, self.sequences
        columns: dict[str, Any] = {"micro": torch.from_numpy(self.members)}
        if Need.REFERENCE_LOGPS in needs:
            sums = [sum(values) for values in annotator.reference_logps(sequences).to_pylist()]
            columns["reference_logps"] = torch.tensor(sums, dtype=torch.float64)
        raw = annotator.cross_rewards(self.rows, sequences, self.members)
        columns["cross_rewards"] = torch.from_numpy(self.scale(raw))
        if Need.CROSS_LOGPS in needs:
            columns["cross_logps"] = torch.from_numpy(annotator.cross_logps(sequences, self.members))
        table = self._table(rewards, **columns)
        weights: torch.Tensor = self.loss.weights(table)
        if self.live:  # the module makes the weights of a step itself, and divides by the same mean
            self.temperature = self.loss.scaled_temperature(table)
            ratio = self.loss.estimator(table, self.temperature) - weights.log()
            self.log_mean_weight = float(ratio[self.members[0, 0]])
            self._columns |= {"rewards": table.rewards, "cross_rewards": table.cross_rewards}
        return weights

    def _table(self, rewards: torch.Tensor | None, **columns: Any) -> Table:
        assert rewards is not None
        group, length = torch.from_numpy(self.sequences.group), torch.from_numpy(self.sequences.length)
        return Table(rewards=rewards, group=group, length=length, **columns)

    def _count_left_out(self, rewards: torch.Tensor | None, keep: np.ndarray) -> None:
        if keep.all():
            return
        silent = uninformative(self._table(rewards)).numpy()
        groups = np.unique(self.sequences.group[~keep & silent])
        self.facts["groups without signal, left out"] = len(groups)
        self.facts["sequences left out with them"] = int((~keep & silent).sum())
        if (~keep & ~silent).any():
            self.facts["sequences left out under loss.min_weight"] = int((~keep & ~silent).sum())
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
            facts["reward"]["within_prompt_sd"] = within_prompt_deviation(rewards, table.group)
            first = np.unique(sequences.group, return_index=True)[1]
            facts["groups"] = len(first)
            facts["groups without signal"] = int(uninformative(table)[first].sum())
        if weights is not None:
            used = np.unique(self.members[self.members >= 0])
            facts["weights"] = health(weights[used], torch.from_numpy(sequences.length[used]))._asdict()
        facts["micro_batches"], facts["steps_per_epoch"] = len(self.plan.micro), self.plan.steps
        facts["plan"] = self.plan.hash
        for name, value in facts.items():
            shown = (
                {k: round(v, 4) if isinstance(v, float) else v for k, v in value.items()}
                if isinstance(value, dict)
                else value
            )
            say(f"  {name.replace('_', ' ')}: {shown}")

    def batch(self, index: int, tokens: float = 1.0, sequences: float = 1.0) -> Packed:
        """Micro-batch `index` of the plan, with the response tokens and sequences of its whole optimiser step."""
        members = self.members[index]
        members = members[members >= 0]
        ids, starts, names = zip(*(self.sequences.tokens(i) for i in members.tolist()), strict=True)
        extra: dict[str, Any] = {}
        for name in ("weights", "rewards"):
            if name in self._columns:
                extra[name] = self._columns[name][members].float()
        if "cross_rewards" in self._columns:
            extra["cross_rewards"] = self._columns["cross_rewards"][index, : len(members), : len(members)].float()
        if "reference_logps" in self._columns:
            column = self._columns["reference_logps"]
            extra["reference_logps"] = torch.tensor([x for i in members for x in column[int(i)].as_py()])
        group = np.unique(self.sequences.group[members], return_inverse=True)[1].tolist()
        return pack(ids, starts, names, group, global_tokens=tokens, global_sequences=sequences, **extra)

    def train_dataloader(self) -> "PlanLoader":
        ranks = Ranks.current()
        return PlanLoader(self, ranks.rank, ranks.world)

    def state_dict(self) -> dict[str, Any]:
        """The position in the plan and its hash: resuming is an index into a stored array."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"plan": self.plan.hash, "epoch": self.trainer.current_epoch, "position": progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["plan"] != self.plan.hash:
            raise UserError(
                f"the checkpoint was made with plan {state['plan']} and this configuration makes {self.plan.hash}: "
                "other data, order, micro-batch or length. Resume with the same data, or start anew with resume=false"
            )
        self._start = (state["epoch"], state["position"])


class PlanLoader:
    """This rank's micro-batches, epoch by epoch, from where a resumed run stopped."""

    def __init__(self, data: AlignmentData, rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world

    def __len__(self) -> int:
        return self.data.plan.length(self.world)

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own: the position is the DataModule's. Without the pair Lightning warns at each resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""

    def __iter__(self) -> Iterator[Packed]:
        assert self.data.trainer is not None
        epoch = self.data.trainer.current_epoch
        at, position = self.data._start
        begin = position if at == epoch and position < len(self) else 0
        self.data._start = (0, 0)
        for n, (index, tokens, sequences) in enumerate(self.data.plan.batches(epoch, self.rank, self.world)):
            if n >= begin:
                yield self.data.batch(index, tokens, sequences)
