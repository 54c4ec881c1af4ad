"""Metrics of training steps, throughput, peak memory, and the budget of seconds."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar

from var.training.loggers import log
from var.training.module import AlignmentModule
from var.utils.console import PACE, say, warn
from var.utils.distributed import Ranks
from var.utils.peak_memory import read_peak, reset_peak


class StepMetrics(Callback):
    """Logs the mean of each metric since the last log, reduced once over the ranks, and throughput.

    Lightning's own `self.log` would reduce each metric by itself.
    """

    def __init__(self, ess_warning: float) -> None:
        """Build the callback.

        Args:
            ess_warning: warn once if the effective sample size since the last log is below this fraction.
        """
        self.ess_warning, self.warned = ess_warning, False
        self.tokens = self.seconds = self.waited = 0.0
        self._started = self._finished = 0.0
        self._step = 0
        self.loss: float | None = None
        """The last loss that was logged."""

    @property
    def tokens_per_second(self) -> float:
        """Prompt and response tokens per second on this rank, in steps and in waiting for data."""
        return self.tokens / max(self.seconds + self.waited, 1e-9)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._step = trainer.global_step
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last step as waiting for data."""
        self._finished = time.perf_counter()

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Count the time since the last micro-batch as waiting for data, including that of writing a checkpoint."""
        now = time.perf_counter()
        self.waited += now - self._finished
        self._started = now

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens and time, and log if a step has ended and is due."""
        assert isinstance(module, AlignmentModule)
        self.tokens += batch.tokens
        self.seconds += time.perf_counter() - self._started
        step = trainer.global_step
        if step != self._step:
            self._step = step
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if step == 1 or step % every == 0 or step >= trainer.estimated_stepping_batches:
                self._log(trainer, module, step)
        self.restart_clock()

    def _log(self, trainer: lightning.Trainer, module: AlignmentModule, step: int) -> None:
        means = module.take_metrics()
        metrics = {f"train/{name}": value for name, value in means.items()}
        if "weight/square" in means:
            square = means["weight/square"]
            ess = means["weight/mean"] ** 2 / square if square else 0.0  # online, all weights of a step may be 0
            metrics["train/weight/ess"] = ess
            del metrics["train/weight/square"]
            if 0 < ess < self.ess_warning and not self.warned:
                self.warned = True
                self._warn(trainer, step, ess)
        if module.gradient_norm is not None:
            metrics["train/grad_norm"] = module.gradient_norm
        if module.skipped:
            metrics["train/skipped"] = float(module.skipped)
        metrics["train/lr"] = module.rate
        metrics["train/epoch"] = float(trainer.current_epoch)
        metrics["throughput/seconds"] = budget(trainer).count(trainer)
        metrics["throughput/tokens_per_second"] = self.tokens_per_second * trainer.world_size
        metrics["throughput/waiting_for_data"] = self.waited / max(self.seconds + self.waited, 1e-9)
        if torch.cuda.is_available():
            metrics["throughput/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        log(trainer, metrics, step)
        self.loss = means.get("loss", self.loss)

    def _warn(self, trainer: lightning.Trainer, step: int, ess: float) -> None:
        weights: Mapping[str, float] = trainer.datamodule.report.weights or {}  # type: ignore[attr-defined]
        cause = "few responses have most of the weight; under VAR, raise loss.temperature"
        if weights.get("length_correlation", 0) < -0.3:
            cause = "short responses get most of the weight: log π_ref is summed over tokens; see loss=var"
        elif weights.get("largest", 0) > 50:
            cause = f"one response has {weights['largest']:.0f} times the mean weight: rewards have a heavy tail"
        warn(f"at step {step} the effective sample size since the last log is {ess:.2f} of the sequences: {cause}.")


class ProgressBar(RichProgressBar):
    """Shows the last loss that was logged. `LightningModule.log` would wait for the device several times per step."""

    def get_metrics(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, Any]:
        """Return Lightning's metrics and the loss."""
        loss = step_metrics(trainer).loss
        return {**super().get_metrics(trainer, module), **({} if loss is None else {"loss": loss})}


class ProgressLines(Callback):
    """Prints step, loss, speed and the time left at most every PACE seconds, without progress bars."""

    def __init__(self) -> None:
        self._first, self._started, self._printed = 0, 0.0, 0.0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._first, self._started = trainer.global_step, time.monotonic()
        self._printed = self._started
        if trainer.is_global_zero and self._first < trainer.estimated_stepping_batches:
            say(f"Training: {_count_steps(trainer)}")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if one is due."""
        step, now = trainer.global_step, time.monotonic()
        if step == self._first or now - self._printed < PACE or not trainer.is_global_zero:
            return
        self._printed, metrics = now, step_metrics(trainer)
        parts = [f"Training: step {step} of {_count_steps(trainer)}"]
        if metrics.loss is not None:
            parts.append(f"loss {metrics.loss:.4g}")
        parts.append(f"{metrics.tokens_per_second * trainer.world_size:,.0f} tokens/s")
        left = (trainer.estimated_stepping_batches - step) * (now - self._started) / (step - self._first)
        limit = budget(trainer)
        left = min(left, limit.seconds - limit.spent)
        if 0 <= left < math.inf:
            parts.append(f"about {timedelta(seconds=round(left))} left")
        say(", ".join(parts))


def _count_steps(trainer: lightning.Trainer) -> str:
    """Return the number of optimizer steps as a text, with the limit of seconds if the run has one."""
    steps, seconds = int(trainer.estimated_stepping_batches), budget(trainer).seconds
    return f"{steps:,} steps" + ("" if seconds == math.inf else f" or {seconds:g} s")


def step_metrics(trainer: lightning.Trainer) -> StepMetrics:
    """Return the trainer's StepMetrics."""
    return next(c for c in trainer.callbacks if isinstance(c, StepMetrics))  # type: ignore[attr-defined]


def budget(trainer: lightning.Trainer) -> "Budget":
    """Return the trainer's Budget, which has the seconds of sampling, scoring and training so far."""
    return next(c for c in trainer.callbacks if isinstance(c, Budget))  # type: ignore[attr-defined]


class PeakMemory(Callback):
    """The peak memory of each stage of a run: annotating, training, evaluating and exporting."""

    def __init__(self) -> None:
        self.peaks: dict[str, dict[str, int]] = {}
        """Bytes at the peak of each stage, of this process; see `read_peak`. Empty if they cannot be measured."""
        self._stage: str | None = None

    def start(self, stage: str | None) -> None:
        """End the current stage and start another one, or none."""
        if self._stage is not None:
            self.peaks[self._stage] = _larger(read_peak(), self.peaks.get(self._stage, {}))
        self._stage = stage if reset_peak() else None

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Interrupt the current stage by another one within the context."""
        outer = self._stage
        self.start(stage)
        yield
        self.start(outer)

    def setup(self, *_: Any, **__: Any) -> None:
        """End the annotation, which the data's setup does."""
        self.start(None)

    def on_train_start(self, *_: Any) -> None:
        """Start the training, so that its peak does not contain that of annotation."""
        self.start("training")

    def on_train_end(self, *_: Any) -> None:
        """End the training."""
        self.start(None)

    def over_ranks(self) -> dict[str, dict[str, int]] | None:
        """Return the largest peaks of all ranks by stage; None if they were not measured. All ranks call this."""
        first, *others = Ranks.current().collect([self.peaks])
        return {
            stage: reduce(_larger, [other.get(stage, {}) for other in others], peak) for stage, peak in first.items()
        } or None


def _larger(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Return the larger of two peaks, number by number."""
    return {kind: max(size, other.get(kind, 0)) for kind, size in one.items()}


class Budget(Callback):
    """Stops at the first step after so many seconds of sampling, scoring and training. Evaluation does not count.

    The learning rate's schedule does not take the budget into account; use a constant one.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._step = seconds, 0
        self.earlier = self.spent = 0.0
        """The seconds spent in earlier attempts of the run, and in all."""

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Stop at once if a resumed run has already spent it."""
        self._step = trainer.global_step
        trainer.should_stop = trainer.should_stop or 0 < self.earlier >= self.seconds

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a complete step if it is spent."""
        if trainer.global_step == self._step:  # stopping within a step would lose what it has accumulated
            return
        self._step = trainer.global_step
        self.spent = self.count(trainer)
        if self.seconds == math.inf:  # what it has spent counts if it resumes with a budget
            return
        over = trainer.datamodule.annotator.ranks.any(self.spent >= self.seconds)  # type: ignore[attr-defined]
        trainer.should_stop = trainer.should_stop or over

    def count(self, trainer: lightning.Trainer) -> float:
        """Return the seconds of this attempt and earlier ones so far."""
        steps = step_metrics(trainer)
        spent: float = self.earlier + trainer.datamodule.seconds + steps.seconds + steps.waited  # type: ignore[attr-defined]
        return spent

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds spent, for a resumed run."""
        return {"spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds spent."""
        self.earlier = self.spent = state_dict["spent"]
