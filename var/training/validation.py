"""Validation before, during and after training: by generation, or a reward model's accuracy on pairs."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from var.annotate.annotator import Annotator
from var.annotate.responses import sample_responses
from var.annotate.rewards import score
from var.annotate.sequence_scores import ProvideSequenceScores
from var.data.rows import Rows
from var.evaluate.answers import (
    Answers,
    compute_logps,
    describe_answers,
    divergence,
    pack_answers,
    samples,
    score_answers,
    win_rate,
)
from var.evaluate.judges.base import Judge, Pair, compute_rates, explain_missing_rate
from var.models.frozen import free_memory
from var.models.packing import whole
from var.models.sharding import use_sharded
from var.models.value_head import unwrap_value_head
from var.rewards.base import Reward, check_answers, release
from var.rewards.scale import Scale
from var.sampling.base import Sample, Samples, Sampling
from var.training.datamodule import AlignmentData
from var.training.loggers import is_logged, log
from var.training.metrics import PeakMemory, step_metrics
from var.training.module import AlignmentModule
from var.utils.console import stage, warn
from var.utils.errors import UserError, brief
from var.utils.files import atomic
from var.utils.statistics import Estimate, estimate_mean


class Validation(Callback):
    """Reward, win rate, length and KL of responses to validation prompts: before, every n steps, and after training.

    The responses before training are the reference's and come from the cache. The win rate compares with them.
    """

    def __init__(
        self,
        sampling: Sampling,
        every_n_steps: int | None,
        reward: Reward | None,
        judge: Judge | None,
        judged: int | None,
        annotator: Annotator,
        folder: Path,
        peaks: PeakMemory,
    ) -> None:
        """Build the callback.

        Args:
            sampling: how responses are sampled.
            every_n_steps: optimizer steps between evaluations; None for none during training.
            reward: None for the run's own.
            judge: compares the first response to each prompt after and before training; None for no judge.
            judged: how many prompts are judged; None for all.
            annotator: has the reference and the cache.
            folder: where samples.jsonl and evaluations.jsonl are written.
            peaks: records the peak memory of evaluations.
        """
        self.peaks = peaks
        self.sampling, self.every_n_steps, self.annotator, self.folder = sampling, every_n_steps, annotator, folder
        self.reward, self.judge, self.judged = reward, judge, judged
        self.before: Answers | None = None
        self.result: dict[str, Any] = {}
        """The results, for summary.json."""
        self._done = -1

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Evaluate the reference."""
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        rows = data.training_set.validation
        if not len(rows):
            return
        with self.peaks.within("evaluating"):
            samples, rewards = evaluate_reference(self.annotator, rows, self.sampling, self.reward)
        scale = data.training_set.scale if self.reward is None else Scale()
        answers = describe_answers(samples, self.annotator.chat)
        self.before = answers if rewards is None else replace(answers, rewards=scale(rewards))
        self.result["before"] = _summarize(self.before)
        if not is_logged(trainer, "validation/length", 0):
            self._log(trainer, self.before, 0)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Evaluate now, if the run was stopped after its checkpoint and before its evaluation.

        What an earlier attempt wrote after the checkpoint is removed.
        """
        if trainer.is_global_zero and (self.folder / "evaluations.jsonl").exists():
            self._keep_evaluations(trainer.global_step + 1)
        if trainer.global_step and not is_logged(trainer, "validation/length", trainer.global_step):
            self._evaluate_if_due(trainer, module)
        self._done = trainer.global_step  # not again within the next step, whose gradients it would drop

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate, if a step has ended and is due."""
        if trainer.global_step != self._done:
            self._evaluate_if_due(trainer, module)

    def _evaluate_if_due(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        step = trainer.global_step
        due = self.every_n_steps and step and step % self.every_n_steps == 0
        if due and self.before is not None and step < trainer.estimated_stepping_batches:
            self._done = step
            after, kl, verdicts = self._evaluate(trainer, module, f"Evaluating step {step}")
            self._log(trainer, after, step, kl, _judge_metrics(verdicts))
            step_metrics(trainer).restart_clock()

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Evaluate the trained policy and write samples.jsonl."""
        if self.before is None:
            return
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        after, kl, verdicts = self._evaluate(trainer, module, "Evaluating the trained policy")
        self.result["judge"] = verdicts
        self.result["after"] = _summarize(after)
        self.result["kl"] = estimate_mean(kl).to_json()
        if after.rewards is not None and self.before.rewards is not None:
            self.result["gain"] = estimate_mean(after.rewards - self.before.rewards).to_json()
            self.result["win_rate"] = estimate_mean(win_rate(after.rewards, self.before.rewards)[:, None]).to_json()
        if not is_logged(trainer, "validation/length", trainer.global_step):  # unless a killed run logged it
            self._log(trainer, after, trainer.global_step, kl, _judge_metrics(verdicts))
        if trainer.is_global_zero:
            with atomic(self.folder / "samples.jsonl") as file:
                for record in samples(data.training_set.validation, self.before, after):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _evaluate(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, title: str
    ) -> tuple[Answers, np.ndarray, dict[str, Any] | None]:
        """Return the policy's responses, their KL [P, K] in nats, and the judge's rates."""
        module.zero_grad(set_to_none=True)
        free_memory()
        with self.peaks.within("evaluating"):
            return self._evaluate_policy(trainer, module, title)

    def _evaluate_policy(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, title: str
    ) -> tuple[Answers, np.ndarray, dict[str, Any] | None]:
        assert isinstance(module, AlignmentModule)
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        rows, ranks = data.training_set.validation, self.annotator.ranks
        chat, precision = self.annotator.chat, self.annotator.reference.precision
        own = rows.select(ranks.deal(len(rows)))
        prompts = [chat.prompt(row.prompt) for row in own]
        with stage(title, len(prompts), "prompts") as advance, precision():
            tokens = module.generate(chat, prompts, self.sampling, advance)
        samples = [[Sample.of(chat, ids) for ids in several] for several in tokens]
        kl = np.stack(ranks.collect(self._divergence(module, own, samples)))
        reward, scale = (self.reward, Scale()) if self.reward else (self.annotator.reward, data.training_set.scale)
        after = score_answers(rows, ranks.collect(samples), reward, scale, chat, ranks)
        release(reward)
        return after, kl, self._judge(trainer, data, after)

    def _divergence(self, module: AlignmentModule, rows: Rows, samples: Samples) -> list[np.ndarray]:
        """Return [K] nats of the policy's responses to each of this rank's prompts.

        The policy is never gathered next to the reference. It is left in the mode it was in.
        """
        reference, training = self.annotator.reference, module.policy.training
        policy, batches = unwrap_value_head(module.policy), pack_answers(self.annotator.chat, rows, samples)  # type: ignore[arg-type]
        module.policy.eval()
        with stage("KL from the reference", 2 * len(batches), "passes") as advance, reference.precision():
            with use_sharded(module.policy, gather=False):
                ours = compute_logps(policy, batches, module.device, advance)
            with reference.lockstep():
                theirs = compute_logps(lambda batch: reference.policy(batch), batches, module.device, advance)
        reference.release()
        module.policy.train(training)
        return divergence(batches, ours, theirs)

    def _judge(self, trainer: lightning.Trainer, data: AlignmentData, after: Answers) -> dict[str, Any] | None:
        """Return the judge's rates, on the first rank. Training continues if the judge fails."""
        if self.judge is None or not trainer.is_global_zero:
            return None
        assert self.before is not None
        pairs = [
            Pair(
                id=row.id, subset=None, seed=0, prompt=row.prompt, gold=row.answer,
                answer=after.texts[i][0], opponent=self.before.texts[i][0],
            )
            for i, row in enumerate(data.training_set.validation.head(self.judged))
        ]  # fmt: skip
        try:
            with stage("Judging", len(pairs), "pairs") as advance:
                judgement = self.judge(pairs, advance)
            rated = compute_rates(judgement, pairs)["all"]
        except Exception as error:  # replies of a server can cause any; the trained model is worth more
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {brief(error)}"
            warn(f"the judge gave no verdict, training continues: {reason}")
            return None
        if missing := explain_missing_rate(rated, judgement.facts):
            warn(missing)
        return {**rated, "facts": judgement.facts}

    def _log(
        self,
        trainer: lightning.Trainer,
        answers: Answers,
        step: int,
        kl: np.ndarray | None = None,
        extra: Mapping[str, float] = {},
    ) -> None:
        if trainer.is_global_zero:
            self._write(answers, step, kl)
        metrics = {"validation/length": float(np.mean(answers.lengths)), **extra}
        if kl is not None:
            metrics["validation/kl"] = float(kl.mean())
        if answers.rewards is not None:
            metrics |= _with_error("validation/reward", estimate_mean(answers.rewards))
            if self.before is not None and self.before.rewards is not None:
                metrics["validation/win_rate"] = float(win_rate(answers.rewards, self.before.rewards).mean())
        log(trainer, metrics, step)

    def _write(self, answers: Answers, step: int, kl: np.ndarray | None) -> None:
        """Add the numbers of each answer to evaluations.jsonl."""
        numbers = {"reward": answers.rewards, "kl": kl, "length": answers.lengths}
        shown = {name: None if values is None else values.tolist() for name, values in numbers.items()}
        self._keep_evaluations(step, json.dumps({"step": step, **shown}) + "\n")

    def _keep_evaluations(self, before: int, *more: str) -> None:
        """Rewrite evaluations.jsonl: the lines of steps before one, and more lines."""
        path = self.folder / "evaluations.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        with atomic(path) as file:
            file.writelines(line for line in lines if json.loads(line)["step"] < before)
            file.writelines(more)


class PairAccuracy(Callback):
    """A reward model's accuracy before and after training: how often the better response of a pair scores higher."""

    def __init__(self, peaks: PeakMemory) -> None:
        self.peaks = peaks
        """Records the peak memory of evaluations."""
        self.result: dict[str, Any] = {}
        """The results, for summary.json."""

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Measure the initial model. A resumed run has its numbers in `state_dict`."""
        if trainer.ckpt_path is None:
            self._measure(trainer, module, "before")

    def state_dict(self) -> dict[str, Any]:
        """Return the initial model's accuracy."""
        return {"before": self.result.get("before")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the initial model's accuracy."""
        if state_dict["before"]:
            self.result["before"] = state_dict["before"]

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Measure the trained model."""
        if "before" not in self.result:  # only if the run was started with eval=off
            warn("the accuracy before training was not measured, since the run was started with eval=off.")
        self._measure(trainer, module, "after")

    @torch.no_grad()
    def _measure(self, trainer: lightning.Trainer, module: lightning.LightningModule, when: str) -> None:
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        provider = next(provider for provider in data.providers if isinstance(provider, ProvideSequenceScores))
        pairs = provider.validation_pairs
        if pairs is None:
            return
        assert isinstance(module, AlignmentModule)
        won, annotator = list[float](), data.annotator
        own = annotator.ranks.deal(len(pairs) // 2)
        with (
            self.peaks.within("evaluating"),
            stage(f"Accuracy {when}", len(own), "pairs") as advance,
            annotator.reference.precision(),
            use_sharded(module.policy, gather=False),
        ):
            for i in own:
                ids = [annotator.chat.complete(pairs.tokens(at)[0]) for at in (2 * i, 2 * i + 1)]
                better, worse = module.policy(whole(ids).to(module.device)).tolist()
                won.append(0.5 if better == worse else float(better > worse))
                advance(1)
        accuracy = estimate_mean(np.array(annotator.ranks.collect(won))[:, None])
        self.result[when] = {"accuracy": accuracy.to_json()}
        if not is_logged(trainer, "validation/accuracy", trainer.global_step):
            log(trainer, _with_error("validation/accuracy", accuracy), trainer.global_step)


def evaluate_reference(
    annotator: Annotator, rows: Rows, sampling: Sampling, reward: Reward | None
) -> tuple[Samples, np.ndarray | None]:
    """Return the reference's answers and their raw rewards [P, K], computed or read from the cache.

    Args:
        annotator: has the reference and the cache.
        rows: the validation prompts.
        sampling: how answers are sampled.
        reward: None for the annotator's. If it cannot score text, there are no rewards.
    """
    annotator = replace(annotator.with_local_sampler, reward=reward or annotator.reward)
    check_answers(annotator.reward, rows)
    samples = sample_responses(annotator, rows, sampling, "Evaluating the reference")
    annotator.reference.release()
    if not annotator.reward.scores_text:
        return samples, None
    triples = [(row.prompt, sample.text, row.answer) for row, own in zip(rows, samples, strict=True) for sample in own]
    rewards = score(annotator, triples, "Rewards of the reference's answers")
    release(annotator.reward)
    return samples, rewards.reshape(len(rows), -1)


def _summarize(answers: Answers) -> dict[str, Any]:
    """Return the results for summary.json."""
    return {
        "reward": None if answers.rewards is None else estimate_mean(answers.rewards).to_json(),
        "length": estimate_mean(answers.lengths.astype(float)).to_json(),
        "truncated": float(1 - answers.finished.mean()),
    }


def _with_error(name: str, estimate: Estimate) -> dict[str, float]:
    """Return the metric and its standard error, which a single prompt does not have."""
    return {name: estimate.mean, **({} if estimate.se is None else {f"{name}_se": estimate.se})}


def _judge_metrics(verdicts: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the judge's win rate on the scale of validation/win_rate, where ties count half."""
    score = verdicts["mean_score"] if verdicts else None
    return {} if score is None else {"validation/judge_win_rate": score}
