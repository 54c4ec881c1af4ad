"""What watches a run: step metrics and throughput, the health of the weights, validation by generation, its curve,
its plan as files, its budget of seconds, a reward model's accuracy."""

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from var.annotate.fill import Annotator, Reward, refuse_unanswered
from var.datamodule import AlignmentData
from var.evaluate.judge import Judge, Pair, rates, unjudged
from var.evaluate.validation import Answers, Estimate, clustered, divergence, rewarded, samples, win_rate
from var.files import atomic
from var.generate import Sampling, sample
from var.module import AlignmentModule
from var.packing import whole
from var.policy import gathered, without_values
from var.problems import UserError
from var.progress import stage, warn
from var.rewards.scale import Scale


class Curves(Logger):
    """metrics.csv of a run. Unlike Lightning's CSVLogger it goes on after a resume instead of starting anew."""

    def __init__(self, path: Path, fresh: bool) -> None:
        super().__init__()
        self.path, self.columns = path, list[str]()
        if fresh:
            self._discard()
        if path.exists():
            with path.open(newline="") as file:
                self.columns = list(csv.DictReader(file).fieldnames or ())

    name = "curves"
    version = ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The resolved configuration stands in .hydra/ and config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if fresh := [name for name in row if name not in self.columns]:
            self.columns.extend(fresh)
            self._rewrite(self._rows())
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def holds(self, name: str, step: int) -> bool:
        """Whether a metric of that step has been logged."""
        return any(int(row["step"] or 0) == step and row.get(name) for row in self._rows())

    @rank_zero_only
    def _discard(self) -> None:
        """What a run left that was killed before its first checkpoint."""
        self.path.unlink(missing_ok=True)

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop what a killed run logged after the checkpoint from which it goes on."""
        self._rewrite([row for row in self._rows() if int(row["step"] or 0) <= step])

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(line for line in file if line.endswith("\n")))  # the last one may be cut

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with atomic(self.path, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def log(trainer: lightning.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """To every logger of the run."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step)


def _with_error(name: str, found: Estimate) -> dict[str, float]:
    """The curve's point and that of its standard error, which a single prompt does not have."""
    return {name: found.mean, **({} if found.se is None else {f"{name}_se": found.se})}


def logged(trainer: lightning.Trainer, name: str, step: int) -> bool:
    """Whether the run's curve has a metric of that step."""
    return any(logger.holds(name, step) for logger in trainer.loggers if isinstance(logger, Curves))


class StepMetrics(Callback):
    """Sums of the steps since the last log, reduced once over the ranks, and throughput.

    ess_warning: once, when a step's effective sample size falls under this share of its sequences, say so and why.
    """

    def __init__(self, ess_warning: float) -> None:
        self.ess_warning, self.warned = ess_warning, False
        self.tokens = self.seconds = self.waited = 0.0
        self._begun = self._ended = 0.0
        self._step = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of prompt and response this rank trained on, over the time of its steps and of waiting for them."""
        return self.tokens / max(self.seconds + self.waited, 1e-9)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, Curves):
                logger.forget_after(trainer.global_step)
        self.restart()

    def restart(self) -> None:
        """What went before was no waiting for data."""
        self._ended = time.perf_counter()

    def _is_due(self, trainer: lightning.Trainer, step: int) -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step == 1 or step % every == 0 or step >= trainer.estimated_stepping_batches

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        self.waited += now - self._ended
        self._begun = now

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, AlignmentModule)
        self.tokens += batch.tokens
        self.seconds += time.perf_counter() - self._begun
        step = trainer.global_step
        if step != self._step:
            self._step = step
            if self._is_due(trainer, step):
                self._log(trainer, module, step)
        self.restart()

    def _log(self, trainer: lightning.Trainer, module: AlignmentModule, step: int) -> None:
        means = module.take_metrics()
        metrics = {f"train/{name}": value for name, value in means.items()}
        if "weight/square" in means:
            square = means["weight/square"]
            ess = means["weight/mean"] ** 2 / square if square else 0.0  # online, a step's weights may all be 0
            metrics["train/weight/ess"] = ess
            del metrics["train/weight/square"]
            if 0 < ess < self.ess_warning and not self.warned:
                self.warned = True
                self._warn(trainer, step, ess)
        if module.gradient_norm is not None:
            metrics["train/grad_norm"] = float(module.gradient_norm)
        if module.skipped:
            metrics["train/skipped"] = float(module.skipped)
        metrics["train/lr"] = module.rate
        metrics["train/epoch"] = float(trainer.current_epoch)
        metrics["throughput/tokens_per_second"] = self.tokens_per_second * trainer.world_size
        metrics["throughput/share_waiting_for_data"] = self.waited / max(self.seconds + self.waited, 1e-9)
        if torch.cuda.is_available():
            metrics["throughput/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        log(trainer, metrics, step)
        if "loss" in means:
            module.log("loss", means["loss"], prog_bar=True, logger=False)

    def _warn(self, trainer: lightning.Trainer, step: int, ess: float) -> None:
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        weights = data.facts.get("weights", {})
        cause = "the temperature is small against the reward's spread: raise loss.temperature"
        if weights.get("length_correlation", 0) < -0.3:
            cause = "weights follow response length, the shortest taking most: log π_ref is summed; see loss=var"
        elif weights.get("largest", 0) > 50:
            cause = f"one response weighs {weights['largest']:.0f} times the mean: rewards have a heavy tail"
        warn(f"at step {step} the effective sample size is {ess:.2f} of the sequences; {cause}.")


def step_metrics(trainer: lightning.Trainer) -> StepMetrics:
    """The run's own."""
    return next(c for c in trainer.callbacks if isinstance(c, StepMetrics))  # type: ignore[attr-defined]


class PlanFile(Callback):
    """In the run's folder: plan.npz, the sequences of each micro-batch, in the first epoch's order, their rows and
    weights; batches.jsonl, the first micro-batches in words."""

    SHOWN = 4

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            with atomic(self.folder / "plan.npz", "wb") as file:
                np.savez(
                    file, micro=data.members, tokens=data.plan.tokens, row=data.rows_of_members,
                    **({} if data.weights is None else {"weight": data.weights}),  # type: ignore[arg-type]
                )  # fmt: skip
            with atomic(self.folder / "batches.jsonl") as file:
                for record in data.records(self.SHOWN):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


class Budget(Callback):
    """Stop at the first step after so many seconds of sampling, scoring and training; evaluation is not counted.

    The learning rate's schedule knows nothing of it: a constant one goes with a budget.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._step, self._spent, self._before = seconds, 0, 0.0, 0.0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        trainer.should_stop = trainer.should_stop or 0 < self._before >= self.seconds

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # within a step, what it has accumulated would be lost
            return
        self._step = trainer.global_step
        steps = step_metrics(trainer)
        self._spent = self._before + trainer.datamodule.seconds + steps.seconds + steps.waited  # type: ignore[attr-defined]
        over = trainer.strategy.reduce_boolean_decision(self._spent >= self.seconds, all=False)
        trainer.should_stop = trainer.should_stop or over

    def state_dict(self) -> dict[str, Any]:
        """What a run has spent that goes on from here."""
        return {"spent": self._spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of state_dict."""
        self._before = state_dict["spent"]


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
        refuse_unanswered(self.reward or self.annotator.reward, data.validation)
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
        with stage(title, len(prompts), "prompts") as advance, precision, gathered(module.policy):
            return sample(module.policy.model, self.annotator.chat, prompts, self.sampling, advance)

    def _divergence(
        self, data: AlignmentData, module: AlignmentModule, texts: list[list[tuple[str, bool]]]
    ) -> np.ndarray:
        """[P, K] nats of the policy's own answers; the module is left in the mode in which it came."""
        reference, training = self.annotator.reference, module.policy.training
        module.policy.eval()
        with stage("KL to the reference", len(texts), "prompts") as advance, reference.precision():
            policy = without_values(module.policy)  # type: ignore[arg-type]
            with gathered(module.policy):
                kl = divergence(policy, reference.policy, self.annotator.chat, data.validation, texts, advance)  # type: ignore[arg-type]
        reference.release()
        module.policy.train(training)
        return kl

    def _rewarded(self, data: AlignmentData, texts: list[list[tuple[str, bool]]]) -> Answers:
        if self.reward is not None:
            return rewarded(data.validation, texts, self.reward, Scale(), self.annotator.chat)
        return rewarded(data.validation, texts, self.annotator.reward, data.scale, self.annotator.chat)

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
            "cut": float(1 - answers.finished.mean()),
        }

    def _log(self, trainer: lightning.Trainer, answers: Answers, step: int, extra: Mapping[str, float] = {}) -> None:
        metrics = {"validation/length": float(np.mean(answers.lengths)), **extra}
        if answers.rewards is not None:
            metrics |= _with_error("validation/reward", clustered(answers.rewards))
            if self.before is not None and self.before.rewards is not None:
                metrics["validation/win_rate"] = float(win_rate(answers.rewards, self.before.rewards).mean())
        log(trainer, metrics, step)
