"""What watches a run: step metrics and throughput, the health of the weights, validation by generation, its curve,
its plan as files, its budget of seconds, a reward model's accuracy."""

import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from var.training.datamodule import AlignmentData
from var.training.loggers import Curves, log
from var.training.module import AlignmentModule
from var.utils.console import warn


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
