"""Resume with the settings of the command: each checkpoint stores its own, and what changed is applied or rejected."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from var.config.changes import Change, list_changes
from var.config.saved import to_saved
from var.config.schema import TrainerSettings
from var.data.plan import Plan
from var.data.rows import Rows
from var.models.pretrained import Pretrained
from var.training.hooks import TrainingHooks
from var.utils.console import say, warn
from var.utils.errors import Problems, UserError
from var.utils.files import atomic, write_json

OPTIMIZER = "optim.optimizer."


class Settings(Callback):
    """Stores the settings in checkpoints and in the run's folder, and applies those that a resumed run changes.

    Optimizer and schedule come out of a checkpoint with the settings they were saved with. Lightning's loops, the
    callbacks and the clipping read theirs from the command.
    """

    def __init__(
        self, cfg: DictConfig, settings: TrainerSettings, folder: Path, saved: Mapping[str, Any] | None
    ) -> None:
        """Compare the settings with those of a checkpoint. Raise UserError for all that cannot change.

        Args:
            cfg: the configuration.
            settings: its trainer settings, with the devices resolved.
            folder: the run's folder.
            saved: what `read_checkpoint` returns; None for a run that starts.
        """
        self.cfg, self.folder = cfg, folder
        self.config = to_saved(cfg)
        self.config["trainer"]["precision"] = settings.arithmetic
        self.changes = list[Change]()
        """The settings that differ from those of the checkpoint."""
        self.history = list[dict[str, Any]]()
        """For each resume that changed settings: the step after which they hold, and values before and after by key."""
        if saved is None:
            return
        optimizer = instantiate(cfg.optim.optimizer, _convert_="all")([torch.nn.Parameter(torch.zeros(2, 2))])
        group = optimizer.param_groups[0]
        self._numbers = {str(name) for name in cfg.optim.optimizer if _is_numeric(group.get(name))}
        if (own := saved.get("settings")) is None:
            warn("resume: the checkpoint does not say with which settings it was made, so they are not compared.")
            return
        self.changes = list_changes(own["config"], self.config)
        self._check(own["steps_per_epoch"], saved["global_step"])
        self.history = list(own["history"])
        if self.changes:
            say(f"resume: {', '.join(map(str, self.changes))}")
            changed = {change.key: [change.before, change.after] for change in self.changes}
            self.history.append({"step": saved["global_step"], "changes": changed})

    def _check(self, steps_per_epoch: int, step: int) -> None:
        problems = Problems("resume: these settings cannot differ from those of the checkpoint")
        for change in self.changes:
            if not change.is_applied and not self._is_hyperparameter(change):
                problems.add(change.key, f"{change.show_values()}; {change.reason}")
        trainer = self.cfg.trainer
        ends = {"trainer.epochs": trainer.epochs * steps_per_epoch, "trainer.max_steps": trainer.max_steps}
        for key, last in ends.items():
            if 0 <= last < step:
                value = OmegaConf.select(self.cfg, key)
                problems.add(key, f"{value} ends at step {last}, and the checkpoint is of step {step}")
        problems.check(
            "Write the settings of the checkpoint to resume from it, or start a new run: resume=false starts from "
            "model.path, and init=<folder of a finished run> from its model."
        )

    def _is_hyperparameter(self, change: Change) -> bool:
        """Whether a change is of a number that the optimizer reads in each step."""
        name = change.key.removeprefix(OPTIMIZER)
        values = _is_numeric(change.before) and _is_numeric(change.after)
        return change.key.startswith(OPTIMIZER) and name in self._numbers and values

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Apply the changes, after everything is restored, and record them."""
        assert isinstance(module, TrainingHooks)
        if trainer.ckpt_path is None:
            return
        module.apply_hyperparameters(self._numbers)
        if trainer.is_global_zero:
            self.write()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the settings."""
        per_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        checkpoint["settings"] = {
            "config": self.config, "steps_per_epoch": per_epoch, "history": self.history,
        }  # fmt: skip

    def write(self) -> None:
        """Write .hydra/, and changes.json if a resume changed settings.

        Hydra itself would write .hydra/ before the command is checked, also if it is rejected or trains nothing.
        """
        (self.folder / ".hydra").mkdir(exist_ok=True)
        files: dict[str, Any] = {"config": self.cfg}
        if HydraConfig.initialized():
            hydra = HydraConfig.instance().cfg
            files |= {"hydra": hydra, "overrides": HydraConfig.get().overrides.task}
        for name, content in files.items():
            with atomic(self.folder / ".hydra" / f"{name}.yaml") as file:
                file.write(OmegaConf.to_yaml(content))
        path = self.folder / "changes.json"
        if self.history:
            write_json(path, self.history)
        else:
            path.unlink(missing_ok=True)


def describe_history(history: list[dict[str, Any]]) -> list[str]:
    """Return a line per resume that changed settings."""
    return [
        f"after step {entry['step']}: "
        + ", ".join(str(Change(key, *values)) for key, values in entry["changes"].items())
        for entry in history
    ]


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_same_weights(saved: Mapping[str, Any] | None, pretrained: Pretrained) -> None:
    """Raise UserError if the data module's state in a checkpoint is of another model."""
    if saved and saved["weights"] != pretrained.weights:
        raise UserError(
            f"model.path: the checkpoint was made from weights {saved['weights']}, and model.path holds "
            f"{pretrained.weights}, so the reference would differ. Restore the model, or start a new run with "
            "resume=false."
        )


def check_same_data(saved: Mapping[str, Any] | None, plan: Plan, rows: Rows) -> None:
    """Raise UserError if the data module's state in a checkpoint has another plan, or other scores or answers."""
    if saved and saved["plan"] != plan.hash:
        raise UserError(
            f"the checkpoint was made with plan {saved['plan']}, and this configuration makes plan {plan.hash}: data, "
            "order, micro-batch or length differ. Resume with the same data, or start a new run with resume=false."
        )
    if saved and saved.get("labels", rows.labels) != rows.labels:
        raise UserError(
            "the checkpoint was made with other scores, weights or answers of the same responses. Resume with the "
            "same data, or start a new run with resume=false."
        )
