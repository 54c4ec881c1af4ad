"""Validation before, during and after training: by generation, or a reward model's accuracy on pairs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from var.annotate.annotator import Annotator
from var.annotate.responses import sample_responses
from var.annotate.sequence_scores import ProvideSequenceScores
from var.evaluate.answers import Answers, divergence, samples, score_answers, win_rate
from var.evaluate.judges.base import Judge, Pair, compute_rates, explain_missing_rate
from var.models.packing import whole
from var.models.policy import gather_parameters
from var.models.value_head import unwrap_value_head
from var.rewards.base import Reward, check_answers
from var.rewards.scale import Scale
from var.sampling.base import Sampling, Texts, decode
from var.training.datamodule import AlignmentData
from var.training.loggers import is_logged, log
from var.training.metrics import step_metrics
from var.training.module import AlignmentModule
from var.utils.console import stage, warn
from var.utils.errors import UserError
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
    ) -> None:
        """Build the callback.

        Args:
            sampling: how responses are sampled.
            every_n_steps: optimizer steps between evaluations; None for none during training.
            reward: None for the run's own.
            judge: compares the first response to each prompt after and before training; None for no judge.
            judged: how many prompts are judged; None for all.
            annotator: has the reference and the cache.
            folder: where samples.jsonl is written.
        """
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
        check_answers(self.reward or self.annotator.reward, rows)
        annotator = self.annotator.with_local_sampler
        texts = sample_responses(annotator, rows, self.sampling, "Evaluating the reference")
        self.before = self._score(data, texts)
        self.annotator.reference.release()
        self.result["before"] = _summarize(self.before)
        if not is_logged(trainer, "validation/length", 0):
            self._log(trainer, self.before, 0)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Evaluate now, if the run was stopped after its checkpoint and before its evaluation."""
        if trainer.global_step and not is_logged(trainer, "validation/length", trainer.global_step):
            self._evaluate_if_due(trainer, module)

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
            self._log(trainer, after, step, {"validation/kl": float(kl.mean()), **_judge_metrics(verdicts)})
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
            extra = {"validation/kl": float(kl.mean()), **_judge_metrics(verdicts)}
            self._log(trainer, after, trainer.global_step, extra)
        if trainer.is_global_zero:
            with atomic(self.folder / "samples.jsonl") as file:
                for record in samples(data.training_set.validation, self.before, after):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _evaluate(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, title: str
    ) -> tuple[Answers, np.ndarray, dict[str, Any] | None]:
        """Return the policy's responses, their KL [P, K] in nats, and the judge's rates."""
        assert isinstance(module, AlignmentModule)
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        chat, precision = self.annotator.chat, self.annotator.reference.precision
        prompts = [chat.prompt(row.prompt) for row in data.training_set.validation]
        with stage(title, len(prompts), "prompts") as advance, precision():
            tokens = module.generate(chat, prompts, self.sampling, advance)
        texts = [[(decode(chat, ids), finished) for ids, finished in several] for several in tokens]
        kl = self._divergence(data, module, texts)
        after = self._score(data, texts)
        return after, kl, self._judge(trainer, data, after)

    def _divergence(self, data: AlignmentData, module: AlignmentModule, texts: Texts) -> np.ndarray:
        """Return [P, K] nats of the policy's responses. The module is left in the mode it was in."""
        reference, training = self.annotator.reference, module.policy.training
        module.policy.eval()
        with stage("KL from the reference", len(texts), "prompts") as advance, reference.precision():
            policy, rows = unwrap_value_head(module.policy), data.training_set.validation  # type: ignore[arg-type]
            with gather_parameters(module.policy):
                kl = divergence(policy, reference.policy, self.annotator.chat, rows, texts, advance)  # type: ignore[arg-type]
        reference.release()
        module.policy.train(training)
        return kl

    def _score(self, data: AlignmentData, texts: Texts) -> Answers:
        trains, reward, scale = data.training_set, self.reward, Scale()
        if reward is None:
            reward, scale = self.annotator.reward, trains.scale
        return score_answers(trains.validation, texts, reward, scale, self.annotator.chat)

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
        except UserError as error:
            warn(f"the judge gave no verdict, training continues: {error}")
            return None
        rated = compute_rates(judgement, pairs)["all"]
        if reason := explain_missing_rate(rated, judgement.facts):
            warn(reason)
        return {**rated, "facts": judgement.facts}

    def _log(self, trainer: lightning.Trainer, answers: Answers, step: int, extra: Mapping[str, float] = {}) -> None:
        metrics = {"validation/length": float(np.mean(answers.lengths)), **extra}
        if answers.rewards is not None:
            metrics |= _with_error("validation/reward", estimate_mean(answers.rewards))
            if self.before is not None and self.before.rewards is not None:
                metrics["validation/win_rate"] = float(win_rate(answers.rewards, self.before.rewards).mean())
        log(trainer, metrics, step)


class PairAccuracy(Callback):
    """A reward model's accuracy before and after training: how often the better response of a pair scores higher."""

    def __init__(self) -> None:
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
        self._measure(trainer, module, "after")

    @torch.no_grad()
    def _measure(self, trainer: lightning.Trainer, module: lightning.LightningModule, when: str) -> None:
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        provider = next(provider for provider in data.providers if isinstance(provider, ProvideSequenceScores))
        pairs = provider.validation_pairs
        if pairs is None:
            return
        assert isinstance(module, AlignmentModule)
        won = []
        with stage(f"Accuracy {when}", len(pairs) // 2, "pairs") as advance, data.annotator.reference.precision():
            for i in range(0, len(pairs), 2):
                ids = [data.annotator.chat.complete(pairs.tokens(at)[0]) for at in (i, i + 1)]
                better, worse = module.policy(whole(ids).to(module.device)).tolist()
                won.append(0.5 if better == worse else float(better > worse))
                advance(1)
        accuracy = estimate_mean(np.array(won)[:, None])
        self.result[when] = {"accuracy": accuracy.to_json()}
        if not is_logged(trainer, "validation/accuracy", trainer.global_step):
            log(trainer, _with_error("validation/accuracy", accuracy), trainer.global_step)


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
