"""The loggers of a run, metrics.csv, and the plan as files."""

import csv
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from var.config.run_dir import hash_config
from var.config.saved import to_saved
from var.training.datamodule import AlignmentData
from var.utils.errors import Problems, UserError, brief
from var.utils.extras import name_install
from var.utils.files import atomic

MLFLOW_SERVER = os.environ.get("MLFLOW_TRACKING_URI")
"""The user's. Lightning's logger replaces the variable by that of its run, which other jobs of a sweep would take."""


class Curves(Logger):
    """Writes metrics.csv. Lightning's CSVLogger would start it again when a run is resumed."""

    name = "curves"
    version = ""

    def __init__(self, path: Path, step: int | None) -> None:
        """Open the file.

        Args:
            path: of metrics.csv.
            step: of the checkpoint from which the run resumes. What an earlier attempt logged after it is removed. None
                for a run without a checkpoint, which removes everything.
        """
        super().__init__()
        self.path, self.columns = path, list[str]()
        self.step = -1 if step is None else step
        if step is None:
            self._remove()
        if path.exists():
            try:
                with path.open(newline="") as file:
                    self.columns = list(csv.DictReader(file).fieldnames or ())
                rows = [row for row in self._rows() if int(row["step"] or 0) <= self.step and None not in row]
            except (ValueError, LookupError, csv.Error) as error:
                raise UserError(
                    f"{path}: is damaged ({type(error).__name__}: {brief(error)}). Rename it to resume with new curves."
                ) from error
            self._rewrite(rows)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the configuration is in .hydra/ and config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row, after rewriting the file if there are new columns."""
        row = {"step": step, **metrics}
        if new := [name for name in row if name not in self.columns]:
            self.columns.extend(new)
            self._rewrite(self._rows())
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def has(self, name: str, step: int) -> bool:
        """Return whether a metric of this step has been logged."""
        return any(int(row["step"] or 0) == step and row.get(name) for row in self._rows())

    @rank_zero_only
    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def rows(self) -> list[tuple[int, dict[str, float]]]:
        """Return the step and the metrics of each row."""
        return [
            (int(row["step"] or 0), {name: float(text) for name, text in row.items() if text and name != "step"})
            for row in self._rows()
        ]

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(line for line in file if line.endswith("\n")))  # the last line may be incomplete

    @rank_zero_only
    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with atomic(self.path, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def log(trainer: lightning.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Log to every logger of the run."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step)


def is_logged(trainer: lightning.Trainer, name: str, step: int) -> bool:
    """Return whether metrics.csv has a metric of this step."""
    return any(logger.has(name, step) for logger in trainer.loggers if isinstance(logger, Curves))


class PlanFile(Callback):
    """Writes what trains together: plan.npz for programs, and the first micro-batches in batches.jsonl for readers.

    plan.npz has the sequences (online: rows) of each micro-batch in the first epoch's order, the micro-batch's response
    tokens, the row of each sequence and, if weights are computed before training, its weight.
    """

    SHOWN = 4
    """Micro-batches in batches.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Write both files on the first rank."""
        data: AlignmentData = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            trains = data.training_set
            weights = {} if trains.weights is None else {"weight": trains.weights.numpy()}
            with atomic(self.folder / "plan.npz", "wb") as file:
                np.savez(file, micro=trains.members, tokens=trains.plan.tokens, row=data.rows_of_members, **weights)  # type: ignore[arg-type]
            with atomic(self.folder / "batches.jsonl") as file:
                for record in data.records(self.SHOWN):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def make_loggers(cfg: DictConfig, folder: Path, curves: Curves, changed: bool = False) -> list[Logger]:
    """Return the loggers besides metrics.csv, which continue it. Raise UserError for a missing key or package.

    Args:
        cfg: the configuration.
        folder: the run's folder.
        curves: metrics.csv.
        changed: whether the settings differ from those of the checkpoint that the run resumes from.
    """
    loggers: list[Logger] = []
    problems = Problems("loggers")
    configuration = re.sub("-[0-9a-f]{8}(-[0-9]+)?$", "", folder.name)
    group = f"{configuration}-{hash_config(cfg, seeds=False)}"  # all seeds of a configuration
    if cfg.logger.wandb:
        import wandb

        from var.training.trackers import Wandb

        has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_has_wandb()
        offline = not has_key if cfg.logger.wandb.offline == "auto" else cfg.logger.wandb.offline
        if not offline and not has_key:
            problems.add(
                "logger.wandb", "there is no WANDB_API_KEY and no netrc entry; set logger.wandb.offline=true or log in"
            )
        else:
            logger = Wandb(
                folder,
                name=cfg.logger.wandb.name or folder.name,
                project=cfg.logger.wandb.project,
                group=group,
                offline=offline,
            )
            try:
                logger.log_hyperparams(to_saved(cfg))
                logger.replay(curves.rows(), curves.step, changed)
            except wandb.errors.UsageError as error:  # such as a name that W&B does not accept
                problems.add("logger.wandb", brief(error))
            except wandb.errors.CommError as error:
                problems.add(
                    "logger.wandb", f"the server does not answer ({brief(error)}); set logger.wandb.offline=true and "
                    "upload later with `wandb sync`"
                )  # fmt: skip
            loggers.append(logger)
    if cfg.logger.mlflow:
        try:
            import mlflow

            from var.training.trackers import MLflow
        except ModuleNotFoundError:
            problems.add("logger.mlflow", f"mlflow is not installed: {name_install('mlflow')}")
        else:
            own = f"sqlite:///{folder.parent.resolve()}/mlflow.db"
            uri = cfg.logger.mlflow.tracking_uri or MLFLOW_SERVER or own
            name = cfg.logger.mlflow.name or folder.name
            options = {"experiment_name": cfg.logger.mlflow.experiment, "run_name": name, "tracking_uri": uri}
            try:
                tracker = MLflow(folder, curves.step >= 0, tags={"group": group}, **options)
                tracker.replay(curves.rows(), curves.step, changed, to_saved(cfg))
                loggers.append(tracker)
            except (mlflow.exceptions.MlflowException, OSError) as error:
                problems.add("logger.mlflow", f"{uri} cannot be used ({brief(error)})")
    if cfg.logger.tensorboard:
        try:
            from var.training.trackers import TensorBoard

            tensorboard = TensorBoard(folder, cfg.logger.tensorboard.name)
            tensorboard.replay(curves.rows())
            loggers.append(tensorboard)
        except ModuleNotFoundError:
            problems.add("logger.tensorboard", f"tensorboard is not installed: {name_install('tensorboard')}")
    problems.check()
    return loggers


def _netrc_has_wandb() -> bool:
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
