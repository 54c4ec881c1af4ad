"""Checkpoints, resuming from them, and ending early: on a signal or a full disk.

Lightning's own checkpoint callback is not used: it can leave no complete checkpoint when a run is killed while saving.
"""

import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fit_loop import _FitLoop

from var.training.optim import state_size
from var.training.sharded import PLAIN, read_metadata
from var.utils.console import say, warn
from var.utils.errors import UserError, brief
from var.utils.files import atomic, name_partial, remove, synchronize, synchronize_folder
from var.utils.provenance import hash_file
from var.utils.signals import SIGNALS, handle_signals, leave

CHECKSUMS = ".sha256"  # the suffix of the file next to a checkpoint


class Checkpoints(Callback):
    """Writes checkpoints/step-N.ckpt every n optimizer steps, at the end of training, and on signals.

    A checkpoint is written under another name, synced and renamed. So at any time there is a complete one. The newest
    two are kept, each with its checksums in step-N.sha256, and last.ckpt links to the newest. On a signal, training
    ends after the current optimizer step, or at once between steps; several ranks agree on it at the end of the next
    step. The exit status is 128 plus the signal, and the same command resumes. Before and after training there is
    nothing to save, and `leave` ends the process at once.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps
        self._signal: int | None = None
        self._within_step = False  # the state within a step must not be saved
        self._step = -1

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Let a checkpoint of the last step run what follows training."""
        trainer.fit_loop.__class__ = FitLoop

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Remove checkpoints of later steps, which are damaged or of another run, and install the signal handlers."""
        self._step = trainer.global_step
        if trainer.is_global_zero:
            for path in checkpoints(self.folder):
                if step_of(path) > self._step:
                    _remove(path)
            self._keep(2)

        def handle(number: int, _: FrameType | None) -> None:
            if number == signal.SIGINT and self._signal is not None:
                raise KeyboardInterrupt  # a second Ctrl-C does not wait for the checkpoint
            self._signal = number
            if not self._within_step and trainer.world_size == 1:
                self._leave(trainer)
            elif number == signal.SIGINT and trainer.is_global_zero:
                say("Interrupted: saving after this optimizer step. Ctrl-C again ends at once.")

        handle_signals(handle, (*SIGNALS, signal.SIGINT))  # after the fit, Lightning restores the previous handlers

    def on_train_batch_start(self, *_: Any) -> None:
        """Mark the beginning of a micro-batch."""
        self._within_step = True

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """After a complete optimizer step, leave on a signal, or save if due."""
        step = trainer.global_step
        if step == self._step:  # a checkpoint would lose what the step has accumulated
            return
        self._step = step
        if trainer.datamodule.annotator.ranks.any(self._signal is not None):  # type: ignore[attr-defined]
            self._leave(trainer)
        if step % self.every_n_steps == 0 or step >= trainer.estimated_stepping_batches or trainer.should_stop:
            self.save(trainer)
        self._within_step = False

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Let signals end the process at once, since everything is saved."""
        if trainer.is_global_zero:
            self._make_room()  # for the exported model
        handle_signals(leave)
        handle_signals(signal.default_int_handler, (signal.SIGINT,))
        if self._signal is not None:  # while the last step was saved
            self._leave(trainer)

    def _leave(self, trainer: lightning.Trainer) -> None:
        self._within_step = True  # so that a second signal does not leave again
        self.save(trainer)
        leave(self._signal or signal.SIGTERM, saved=f"; saved step {self._step}")  # or another rank received it

    def save(self, trainer: lightning.Trainer) -> None:
        """Save the state between two steps. All ranks must call it."""
        path = self.folder / f"step-{trainer.global_step}.ckpt"
        partial = Path(trainer.strategy.broadcast(str(name_partial(path))))
        if path.exists():
            return
        if trainer.is_global_zero:
            for old in self.folder.glob("*.partial"):
                remove(old)
            self._make_room()
        trainer.strategy.barrier("checkpoint")
        try:
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                with atomic(path.with_suffix(CHECKSUMS)) as file:
                    file.write(list_checksums(partial, path.name))
                synchronize(partial)
                partial.replace(path)
                link = name_partial(self.folder / "last.ckpt")
                link.symlink_to(path.name)
                link.replace(self.folder / "last.ckpt")
                synchronize_folder(self.folder)
                self._keep(2)
        except OSError as error:
            remove(partial)
            self._keep(1)  # so that the next attempt has more room
            kept = checkpoints(self.folder)
            raise UserError(
                f"the checkpoint of step {trainer.global_step} cannot be written: {error.strerror} at {self.folder}. "
                + (f"{kept[-1].name} is complete. " if kept else "There is no earlier one. ")
                + "Free disk space and run the same command to resume."
            ) from error
        trainer.strategy.barrier("checkpoint")

    def _make_room(self) -> None:
        """Keep only the newest checkpoint if the disk has no space for as much again."""
        found = checkpoints(self.folder)
        if found and free_bytes(self.folder) < sum(file.stat().st_size for file in _files(found[-1])):
            self._keep(1)

    def _keep(self, count: int) -> None:
        """Remove all but the newest checkpoints, and checksums without a checkpoint."""
        for old in checkpoints(self.folder)[:-count]:
            _remove(old)
        for sums in self.folder.glob(f"step-*{CHECKSUMS}"):
            if not sums.with_suffix(".ckpt").exists():
                remove(sums)


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint at its path.

    Lightning's own builds it in memory and then in the folder of temporary files, which can be small, and where a kill
    leaves it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


class FitLoop(_FitLoop):
    """A fit loop that does not skip. Lightning's own would skip the end of training after a last checkpoint."""

    @property
    def skip(self) -> bool:
        """Never."""
        return False


def rescale_progress(loops: dict[str, Any], convert: Callable[[int], int]) -> None:
    """Convert a checkpoint's progress, which counts a rank's micro-batches, to another number of ranks."""
    for part in ("total", "current"):
        progress = loops["fit_loop"]["epoch_loop.batch_progress"][part]
        behind = progress["processed"] - progress["completed"]  # the hook that saves belongs to the last micro-batch
        for name in ("ready", "started", "processed"):
            progress[name] = convert(progress[name])
        progress["completed"] = progress["processed"] - behind


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest checkpoint in a folder that is not damaged, and what `read_checkpoint` returns of it.

    Print a warning for each newer one. If the folder has no checkpoint, return None and an empty dictionary. Raise
    UserError if all are damaged.
    """
    problems = list[str]()
    for path in reversed(checkpoints(folder)):
        try:
            content = read_checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn(f"{problem} The run resumes from {path.name} instead.")
        say(f"Resuming from {path.resolve()}")
        return path, content
    if problems:
        raise UserError(f"{problems[0]} No other checkpoint exists. Use resume=false to start a new run.")
    return None, {}


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint, with its tensors on the meta device.

    Raise UserError if it is damaged or a pickle of anything but tensors and plain values. Nothing that it names is run.
    A checkpoint without checksums, as earlier versions wrote it, is accepted.
    """
    if (last := checkpoint / "checkpoints" / "last.ckpt").exists():
        raise UserError(f"resume={checkpoint} is the folder of a run. Write resume={last}.")
    real = checkpoint.resolve()
    try:
        if (sums := real.with_suffix(CHECKSUMS)).exists() and sums.read_text() != list_checksums(real, real.name):
            raise ValueError(f"its checksums differ from {sums.name}")
        if checkpoint.is_dir():
            read_metadata(checkpoint)
        plain = checkpoint / PLAIN if checkpoint.is_dir() else checkpoint
        content: dict[str, Any] = torch.load(plain, map_location="meta", weights_only=True)
        _check_form(content, "state_dict" if checkpoint.is_file() else "loops")
    except Exception as error:  # torch and pickle raise many kinds
        raise UserError(
            f"resume={checkpoint} is not a checkpoint of a run: it is damaged, or a pickle that names objects other "
            f"than tensors and plain values ({type(error).__name__}: {brief(error)}). No code in it was executed."
        ) from error
    return content


FORM: dict[str, type] = {
    "state_dict": dict, "loops": dict, "global_step": int, "callbacks": dict, "optimizer_states": list,
    "lr_schedulers": list, "pytorch-lightning_version": str, "AlignmentData": dict, "settings": dict,
}  # fmt: skip
"""The types of parts of a checkpoint."""


def _check_form(content: dict[str, Any], needed: str) -> None:
    """Raise an error if parts of a checkpoint are missing or have other types than those that are written."""
    if missing := {needed, "loops", "global_step"} - content.keys():
        raise ValueError(f"{min(missing)} is missing")
    for name, kind in FORM.items():
        if not isinstance(content.get(name, kind()), kind):
            raise ValueError(f"{name} is not of type {kind.__name__}")
    settings = {"config": {}, "history": [], **content.get("settings", {})}
    entries = [entry["changes"] for entry in settings["history"]]
    if not (isinstance(settings["config"], dict) and all(len(pair) == 2 for e in entries for pair in e.values())):
        raise ValueError("settings have another form")


def list_checksums(checkpoint: Path, name: str) -> str:
    """Return the SHA-256 of each file of a checkpoint, as sha256sum writes them. name: of the complete checkpoint."""
    files = _files(checkpoint)
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(hash_file, files)
    names = [(Path(name) / file.relative_to(checkpoint)).as_posix() for file in files]
    return "".join(f"{found}  {path}\n" for found, path in zip(hashes, names, strict=True))


def _files(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.rglob("*") if file.is_file()) if checkpoint.is_dir() else [checkpoint]


def _remove(checkpoint: Path) -> None:
    remove(checkpoint)
    remove(checkpoint.with_suffix(CHECKSUMS))


def check_disk_space(folder: Path, policy: torch.nn.Module, optimizer: Any, dtype: torch.dtype) -> None:
    """Raise UserError if the run's last checkpoint and its exported model do not fit on the disk.

    Warn if two checkpoints do not fit: the next one is written before an earlier one is removed.

    Args:
        folder: of the run.
        policy: the model that trains.
        optimizer: makes the optimizer; a partial of its class.
        dtype: of the exported model.
    """
    parameters = list(policy.parameters())
    kind = getattr(optimizer, "func", None)  # Hydra's partial
    state = sum(p.numel() * (p.itemsize + state_size(kind, p.itemsize)) for p in parameters if p.requires_grad)
    model = sum(p.numel() * dtype.itemsize for p in parameters)
    here = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    free = free_bytes(folder)
    place = f"runs: {folder.absolute()} has {free / 2**30:.2f} GiB free, and"
    if state + model > free + here:
        raise UserError(
            f"{place} the run ends with a checkpoint of {state / 2**30:.2f} GiB and a model of "
            f"{model / 2**30:.2f} GiB. Free disk space or set runs=<folder>."
        )
    if 2 * state > free + here:
        warn(
            f"{place} two checkpoints of {state / 2**30:.2f} GiB do not fit. A run that writes several stops with an "
            "error at the second one. Free disk space, set runs=<folder>, or set trainer.checkpoint_every_n_steps to "
            "the number of steps."
        )


def free_bytes(folder: Path) -> int:
    """Return the bytes that can be written at a folder, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, by step."""
    return sorted((path for path in folder.glob("step-*.ckpt") if path.stem[5:].isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(checkpoint.stem.removeprefix("step-"))
