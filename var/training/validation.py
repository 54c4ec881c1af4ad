"""Validation during training: by generation, or a reward model's accuracy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from var.annotate.annotator import Annotator
from var.evaluate.answers import Answers, divergence, samples, score_answers, win_rate
from var.evaluate.judges.base import Judge, Pair, rates, unjudged
from var.models.packing import whole
from var.models.policy import gather_parameters
from var.models.value_head import unwrap_value_head
from var.rewards.base import Reward, check_answers
from var.rewards.scale import Scale
from var.sampling.base import Sampling
from var.sampling.local import sample
from var.training.datamodule import AlignmentData
from var.training.loggers import _with_error, log, logged
from var.training.metrics import step_metrics
from var.training.module import AlignmentModule
from var.utils.console import stage, warn
from var.utils.errors import UserError
from var.utils.files import atomic
from var.utils.statistics import clustered


class PairAccuracy(Callback):
    """Of a reward model: the share of held-out pairs whose better response scores higher, before and after."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {}

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.ckpt_path is None:  # else the weights are a checkpoint's already, and state_dict's numbers are there
            self._measure(trainer, module, "before")

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.result.get("before")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of state_dict."""
        if state_dict["before"]:
            self.result["before"] = state_dict["before"]

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._measure(trainer, module, "after")

    @torch.no_grad()
    def _measure(self, trainer: lightning.Trainer, module: lightning.LightningModule, when: str) -> None:
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        pairs = data.validation_pairs
        if pairs is None:
            return
        assert isinstance(module, AlignmentModule)
        won = []
        with stage(f"Accuracy {when}", len(pairs) // 2, "pairs") as advance, data.annotator.reference.precision():
            for i in range(0, len(pairs), 2):
                ids = [data.annotator.chat.closed(pairs.tokens(at)[0]) for at in (i, i + 1)]
                better, worse = module.policy(whole(ids).to(module.device)).tolist()
                won.append(0.5 if better == worse else float(better > worse))
                advance(1)
        accuracy = clustered(np.array(won)[:, None])
        self.result[when] = {"accuracy": accuracy._asdict()}
        step = trainer.global_step
        if logged(trainer, "validation/accuracy", step):
            return
        log(trainer, _with_error("validation/accuracy", accuracy), step)


def _judged(verdicts: Mapping[str, Any] | None) -> dict[str, float]:
    """The curve's point, on the scale of validation/win_rate: ties count half."""
    score = verdicts["mean_score"] if verdicts else None
    return {} if score is None else {"validation/judge_win_rate": score}


class Validation(Callback):
    """Reward, win rate against the start, length and KL of answers to held-out prompts: before, every n steps, after.

    The answers before training are the reference's and come from the store. reward: None: the run's own. judge: sees
    the first answer to each of the first `judged` prompts, after and before; None: none. result: for the summary.
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
        self.sampling, self.every_n_steps, self.annotator, self.folder = sampling, every_n_steps, annotator, folder
        self.reward, self.judge, self.judged = reward, judge, judged
        self.before: Answers | None = None
        self.result: dict[str, Any] = {}
        self._done = -1

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        if not len(data.validation):
            return
        check_answers(self.reward or self.annotator.reward, data.validation)
        texts = self.annotator.here.sampled(data.validation, self.sampling, "Evaluating the start")
        self.before = self._rewarded(data, texts)
        self.annotator.reference.release()
        self.result["before"] = self._summary(self.before)
        if not logged(trainer, "validation/length", 0):
            self._log(trainer, self.before, 0)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """A run that was stopped after its checkpoint and before its evaluation makes up for it."""
        if trainer.global_step and not logged(trainer, "validation/length", trainer.global_step):
            self._evaluate_if_due(trainer, module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._done:
            self._evaluate_if_due(trainer, module)

    def _evaluate_if_due(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        step = trainer.global_step
        due = self.every_n_steps and step and step % self.every_n_steps == 0
        if due and self.before is not None and step < trainer.estimated_stepping_batches:
            self._done = step
            after, kl, verdicts = self._evaluated(trainer, module, f"Evaluating step {step}")
            self._log(trainer, after, step, {"validation/kl": float(kl.mean()), **_judged(verdicts)})
            step_metrics(trainer).restart()

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self.before is None:
            return
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        after, kl, verdicts = self._evaluated(trainer, module, "Evaluating the end")
        self.result["judge"] = verdicts
        self.result["after"] = self._summary(after)
        self.result["kl"] = clustered(kl)._asdict()
        if after.rewards is not None and self.before.rewards is not None:
            self.result["gain"] = clustered(after.rewards - self.before.rewards)._asdict()
            self.result["win_rate"] = clustered(win_rate(after.rewards, self.before.rewards)[:, None])._asdict()
        if not logged(trainer, "validation/length", trainer.global_step):  # by the one before, which was killed here
            extra = {"validation/kl": float(kl.mean()), **_judged(verdicts)}
            self._log(trainer, after, trainer.global_step, extra)
        if trainer.is_global_zero:
            with atomic(self.folder / "samples.jsonl") as file:
                for record in samples(data.validation, self.before, after):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _evaluated(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, title: str
    ) -> tuple[Answers, np.ndarray, dict[str, Any] | None]:
        """The policy's answers as it now is, their KL [P, K] in nats, and the judge's rates."""
        assert isinstance(module, AlignmentModule)
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        texts = self._sample(trainer, module, title)
        kl = self._divergence(data, module, texts)
        after = self._rewarded(data, texts)
        return after, kl, self._verdicts(trainer, data, after)

    def _sample(self, trainer: lightning.Trainer, module: AlignmentModule, title: str) -> list[list[tuple[str, bool]]]:
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        prompts = [row.prompt for row in data.validation]
        precision = self.annotator.reference.precision()
        with stage(title, len(prompts), "prompts") as advance, precision, gather_parameters(module.policy):
            return sample(module.policy.model, self.annotator.chat, prompts, self.sampling, advance)

    def _divergence(
        self, data: AlignmentData, module: AlignmentModule, texts: list[list[tuple[str, bool]]]
    ) -> np.ndarray:
        """[P, K] nats of the policy's own answers; the module is left in the mode in which it came."""
        reference, training = self.annotator.reference, module.policy.training
        module.policy.eval()
        with stage("KL to the reference", len(texts), "prompts") as advance, reference.precision():
            policy = unwrap_value_head(module.policy)  # type: ignore[arg-type]
            with gather_parameters(module.policy):
                kl = divergence(policy, reference.policy, self.annotator.chat, data.validation, texts, advance)  # type: ignore[arg-type]
        reference.release()
        module.policy.train(training)
        return kl

    def _rewarded(self, data: AlignmentData, texts: list[list[tuple[str, bool]]]) -> Answers:
        if self.reward is not None:
            return score_answers(data.validation, texts, self.reward, Scale(), self.annotator.chat)
        return score_answers(data.validation, texts, self.annotator.reward, data.scale, self.annotator.chat)

    def _verdicts(self, trainer: lightning.Trainer, data: AlignmentData, after: Answers) -> dict[str, Any] | None:
        """The judge's rates, asked for by the first process; a judge that fails does not end the training."""
        if self.judge is None or not trainer.is_global_zero:
            return None
        assert self.before is not None
        pairs = [
            Pair(
                id=row.id, subset=None, seed=0, prompt=row.prompt, gold=row.answer,
                answer=after.texts[i][0], opponent=self.before.texts[i][0],
            )
            for i, row in enumerate(data.validation.head(self.judged))
        ]  # fmt: skip
        try:
            with stage("Judging", len(pairs), "pairs") as advance:
                judgement = self.judge(pairs, advance)
        except UserError as error:
            warn(f"the judge gave no verdict, training goes on: {error}")
            return None
        rated = rates(judgement, pairs)["all"]
        if reason := unjudged(rated, judgement.facts):
            warn(reason)
        return {**rated, "facts": judgement.facts}

    def _summary(self, answers: Answers) -> dict[str, Any]:
        return {
            "reward": None if answers.rewards is None else clustered(answers.rewards)._asdict(),
            "length": clustered(answers.lengths.astype(float))._asdict(),
            "truncated": float(1 - answers.finished.mean()),
        }

    def _log(self, trainer: lightning.Trainer, answers: Answers, step: int, extra: Mapping[str, float] = {}) -> None:
        metrics = {"validation/length": float(np.mean(answers.lengths)), **extra}
        if answers.rewards is not None:
            metrics |= _with_error("validation/reward", clustered(answers.rewards))
            if self.before is not None and self.before.rewards is not None:
                metrics["validation/win_rate"] = float(win_rate(answers.rewards, self.before.rewards).mean())
        log(trainer, metrics, step)
