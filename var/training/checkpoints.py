"""Checkpoints, how a run goes on from one, and how it ends before its end: a signal, a full disk."""

import os
import pickle
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fit_loop import _FitLoop

from var.training.optim import state_size
from var.utils.console import say
from var.utils.errors import UserError

if TYPE_CHECKING:
    from var.training.module import AlignmentModule


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM and others send before they kill; USR1 where it is asked to


class Checkpoints(Callback):
    """checkpoints/step-N.ckpt, every so many optimiser steps, at the end of training, and when told to leave.

    Each is written beside, synchronised, and renamed: whatever happens one whole checkpoint is there, and only the
    newest is kept; last.ckpt is a link to it. Told to leave by SIGTERM or SIGUSR1, training ends with the optimiser
    step that runs, at once where none does (several ranks agree on it at the end of the next one); the exit status is
    128 and the signal, and the same command goes on.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps
        self._told: int | None = None
        self._within = False  # a step: its state is not to be saved
        self._over = False  # training is, and saved
        self._step = -1

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        trainer.fit_loop.__class__ = FitLoop

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:  # what a run left that was killed before it had cleared up
            for old in checkpoints(self.folder)[:-1]:
                remove(old)

        def told(number: int, _: FrameType | None) -> None:
            self._told = number
            if self._over or (not self._within and trainer.world_size == 1):
                self._leave(trainer)

        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            for number in SIGNALS:  # Lightning puts back what was there before the fit, for every signal
                signal.signal(number, told)

    def on_train_batch_start(self, *_: Any) -> None:
        self._within = True

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._step:  # what a step has accumulated is in no checkpoint
            return
        self._step = step
        if trainer.strategy.reduce_boolean_decision(self._told is not None, all=False):
            self._leave(trainer)
        if step % self.every_n_steps == 0 or step >= trainer.estimated_stepping_batches or trainer.should_stop:
            self.save(trainer)
        self._within = False

    def on_train_end(self, *_: Any) -> None:
        self._over = True

    def _leave(self, trainer: lightning.Trainer) -> None:
        self._within = True  # a second signal finds this under way
        if not self._over:
            self.save(trainer)
        number = self._told or signal.SIGTERM  # another rank was told
        say(f"Told to leave by {signal.Signals(number).name}: step {self._step} is saved, the same command goes on.")
        raise SystemExit(128 + number)

    def save(self, trainer: lightning.Trainer) -> None:
        """Of the state between two steps. By all ranks."""
        path = self.folder / f"step-{trainer.global_step}.ckpt"
        partial = path.with_suffix(".partial")
        if path.exists():
            return
        if trainer.is_global_zero:
            for old in self.folder.glob("*.partial"):
                remove(old)
        trainer.strategy.barrier("checkpoint")
        try:
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                synchronize(partial)
                partial.replace(path)
                link = self.folder / "last.partial"
                link.symlink_to(path.name)
                link.replace(self.folder / "last.ckpt")
                for old in checkpoints(self.folder)[:-1]:
                    remove(old)
        except OSError as error:
            remove(partial)
            kept = checkpoints(self.folder)
            raise UserError(
                f"the checkpoint of step {trainer.global_step} cannot be written: {error.strerror} at {self.folder}; "
                + (f"{kept[-1].name} is whole. " if kept else "there is none before it. ")
                + "Make room; the same command goes on"
            ) from error
        trainer.strategy.barrier("checkpoint")


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint where it is told to. Lightning's own makes it whole in memory first, then in the folder of
    temporary files, which may be small, and where a kill leaves it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


class FitLoop(_FitLoop):
    """Lightning's own returns at once where a checkpoint is of the last step, before what follows on training."""

    @property
    def skip(self) -> bool:
        return False


def rescale_progress(loops: dict[str, Any], before: int, now: int) -> None:
    """A checkpoint's progress counts a rank's own micro-batches: make it what it would be on `now` ranks for `before`.

    Each optimiser step has the same micro-batches, shared out among the ranks, and a checkpoint stands between two.
    """
    for part in ("total", "current"):
        progress = loops["fit_loop"]["epoch_loop.batch_progress"][part]
        behind = progress["processed"] - progress["completed"]  # the hook that saves belongs to the last one
        for name in ("ready", "started", "processed"):
            progress[name] = progress[name] * before // now
        progress["completed"] = progress["processed"] - behind


def check_checkpoint(checkpoint: Path) -> None:
    """A checkpoint is read without running what it names; one that names more than a run's is refused.

    Of a sharded one torch would unpickle `.metadata` as it is.
    """
    try:
        if checkpoint.is_dir():
            with (checkpoint / ".metadata").open("rb") as file:
                Metadata(file).load()
        else:  # its form alone, without the numbers
            torch.load(checkpoint, map_location="meta", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds
        raise UserError(
            f"resume={checkpoint} is no checkpoint of a run: it is damaged, or a pickle that names something else than "
            "tensors and plain values, which is not run"
        ) from error


class Metadata(pickle.Unpickler):
    """Of what torch.distributed.checkpoint writes there, and of nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        plain = {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
                 ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}  # fmt: skip
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (dtype or (module, name) in plain or module == "torch.distributed.checkpoint.metadata"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def check_disk_space(folder: Path, module: "AlignmentModule") -> None:
    """A run ends with a checkpoint and the model: that they have no room is told before anything is computed."""
    parameters = list(module.policy.parameters())
    kind = getattr(module.optimizer, "func", None)  # Hydra's partial
    state = sum(p.numel() * (p.itemsize + state_size(kind, p.itemsize)) for p in parameters if p.requires_grad)
    model = sum(p.numel() * p.itemsize for p in parameters)
    here = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    free = room(folder)
    if state + model > free + here:
        raise UserError(
            f"runs: {folder.absolute()} has room for {free / 2**30:.2f} GiB, and the run ends with a checkpoint of "
            f"{state / 2**30:.2f} and a model of {model / 2**30:.2f}. Make room, or set runs=<a folder elsewhere>"
        )


def room(folder: Path) -> int:
    """Bytes that may be written there, whether it exists yet or not."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, by step."""
    return sorted(folder.glob("step-*.ckpt"), key=lambda path: int(path.stem.removeprefix("step-")))


def synchronize(path: Path) -> None:
    """Wait until the disk has a file, or a folder's."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """A file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
