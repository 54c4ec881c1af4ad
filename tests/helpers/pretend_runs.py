"""Train on the pretend device, with the configuration, data module, hooks, callbacks and Trainer of train.py."""

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.helpers.pretend import DEVICE, Pretend, syncs
from tests.helpers.runs import composed, curve
from var.training.checkpoints import Checkpoints
from var.training.run import Run


def start() -> None:
    """Prepare a process that runs tests: leave what is imported by now out of garbage collections."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


class PretendAccelerator(CPUAccelerator):
    """The pretend device as Lightning sees it."""

    def setup_device(self, device: torch.device) -> None:
        """Accept the device."""


class Count(Callback):
    """Counts the synchronizations of each optimizer step, from the first micro-batch on, callbacks included."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        """The synchronizations of each optimizer step."""
        self._step = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start to count at the first micro-batch."""
        if not self.steps:
            self.steps.append([])
            syncs.clear()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Start a new list after a complete optimizer step."""
        self.steps[-1] += syncs
        syncs.clear()
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.steps.append([])

    def on_train_end(self, *_: Any) -> None:
        """Attribute the rest to the last optimizer step."""
        self.steps.pop()
        self.steps[-1] += syncs


def train(
    options: list[str], folder: Path, *more: str, attention: str = "packed"
) -> tuple[Run, list[list[str]], list[dict[str, str]]]:
    """Train on the pretend device; return the run, the synchronizations of each step, and the rows of metrics.csv.

    A configuration with `attention` varlen would be rejected without CUDA, so the loaded policy is switched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, trainer_class = Count(), lightning.Trainer

    def make_trainer(*, callbacks: list[Any], **settings: Any) -> lightning.Trainer:
        settings |= {"accelerator": PretendAccelerator(), "strategy": SingleDeviceStrategy(DEVICE)}
        return trainer_class(callbacks=[*callbacks, count], **settings)

    with (
        Pretend(),
        mock.patch("lightning.Trainer", make_trainer),
        mock.patch.object(Checkpoints, "save"),  # it copies the model to the host
    ):
        run = Run.compose(composed(*options, *more), folder)
        run.annotator.reference.device = DEVICE
        torch.manual_seed(0)
        trainer, module = run.trainer(), run.module()
        module.policy.model.set_attn_implementation(attention)
        trainer.fit(module, run.data)
    return run, count.steps, curve(folder)
