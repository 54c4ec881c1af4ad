"""metrics.csv and the loggers of a run."""

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
from var.config.schema import to_dict
from var.training.datamodule import AlignmentData
from var.utils.errors import Problems, brief
from var.utils.files import atomic
from var.utils.statistics import Estimate


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


def loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """What logs beside metrics.csv. A missing key or package is an error here, before anything expensive."""
    out: list[Logger] = []
    problems = Problems("loggers")
    if cfg.logger.wandb:
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_has_wandb()
        offline = not has_key if cfg.logger.wandb.offline == "auto" else cfg.logger.wandb.offline
        if not offline and not has_key:
            problems.add(
                "logger.wandb", "no WANDB_API_KEY and no netrc entry; set logger.wandb.offline=true, or log in"
            )
        else:
            name = cfg.logger.wandb.name or folder.name
            logger = WandbLogger(
                name=name,
                project=cfg.logger.wandb.project,
                group=f"{re.sub('-[0-9a-f]{8}(-[0-9]+)?$', '', folder.name)}-{hash_config(cfg, seeds=False)}",
                offline=offline,
                save_dir=folder,
            )
            try:
                logger.log_hyperparams(to_dict(cfg))
            except wandb.errors.CommError as error:
                problems.add(
                    "logger.wandb", f"the server does not answer ({brief(error)}); "
                    "logger.wandb.offline=true writes what `wandb sync` sends later"
                )  # fmt: skip
            out.append(logger)
    if cfg.logger.tensorboard:
        try:
            from lightning.pytorch.loggers import TensorBoardLogger

            out.append(TensorBoardLogger(folder, name="tensorboard", version=cfg.logger.tensorboard.name))
        except ModuleNotFoundError:
            problems.add("logger.tensorboard", "an extra: pip install -e '.[tensorboard]'")
    problems.check()
    return out


def _netrc_has_wandb() -> bool:
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
