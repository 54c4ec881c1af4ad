"""W&B, MLflow and TensorBoard over several attempts of one run: each step once, and none missing.

metrics.csv has the steps up to the checkpoint that a run resumes from. What a killed attempt passed to a tracker can be
more, and what the tracker has stored can be less: W&B writes its offline file in large blocks. So a resumed run starts
new files with the contents of metrics.csv, and sends W&B's server only what it lacks. Points from before the resume get
its time.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from var.utils.console import warn
from var.utils.errors import brief
from var.utils.files import atomic, make_file_name, remove

Row = tuple[int, Mapping[str, float]]
"""An optimizer step and metrics of it."""


class Wandb(WandbLogger):
    """A W&B run whose id is kept in the run's folder, so that a resumed run continues it, online and offline."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """Read or draw the id, and remove the offline files of earlier attempts. `options` are WandbLogger's."""
        super().__init__(save_dir=folder, id=self._prepare(folder / "wandb"), **options)
        self._last, self._sent = -1, dict[str, Any]()

    @staticmethod
    @rank_zero_only
    def _prepare(folder: Path) -> str:
        path = folder / "id"
        name = path.read_text(errors="replace") if path.exists() else ""
        if not re.fullmatch("[0-9a-f]{8}", name):  # a folder from elsewhere could name files to remove
            name = secrets.token_hex(4)
            folder.mkdir(exist_ok=True)
            with atomic(path) as file:
                file.write(name)
        for earlier in folder.glob(f"offline-run-*-{name}"):  # `replay` writes their metrics again
            remove(earlier)
        return name

    @rank_zero_only
    def replay(self, rows: Sequence[Row], step: int, changed: bool) -> None:
        """Log the rows of metrics.csv that the server lacks; all of them if it is not asked (offline).

        Args:
            rows: of metrics.csv, up to `step`.
            step: of the checkpoint that the run resumes from.
            changed: whether its settings differ from those of the earlier attempt.
        """
        self._sent = dict(self.experiment.summary)
        self._last = int(self._sent.get("trainer/global_step", -1))
        if changed and self._last > step:
            warn(
                f"logger.wandb: the points of steps {step + 1} to {self._last} are from before the settings changed. "
                "W&B does not replace points; metrics.csv has the new ones."
            )
        for number, metrics in rows:
            self.log_metrics(metrics, number)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Log metrics that the server does not have. Of its last step it may have some of them."""
        if step is not None and step <= self._last:
            metrics = {k: v for k, v in metrics.items() if step == self._last and self._sent.get(k) != v}
        if metrics:
            super().log_metrics(metrics, step)


class MLflow(MLFlowLogger):
    """An MLflow run whose id is kept in the run's folder, so that a resumed run continues it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """Read the id of an earlier attempt. `options` are MLFlowLogger's."""
        self._path = folder / "mlflow_run"
        name = self._path.read_text(errors="replace") if self._path.exists() else ""
        self._continued = re.fullmatch("[0-9a-f]{32}", name) is not None
        super().__init__(run_id=name if self._continued else None, **options)
        self._stored, self._warned = set[tuple[str, int]](), False

    @rank_zero_only
    def replay(self, rows: Sequence[Row], config: Mapping[str, Any]) -> None:
        """Log the rows of metrics.csv that the server lacks, and the configuration of a new run.

        MLflow's parameters cannot change, so a resumed run keeps those of its first attempt.
        """
        client, run = self.experiment, self.run_id
        assert run is not None
        if self._continued:
            client.update_run(run, status="RUNNING")
            for name in client.get_run(run).data.metrics:
                self._stored |= {(name, one.step) for one in client.get_metric_history(run, name)}
        else:
            with atomic(self._path) as file:
                file.write(run)
            self.log_hyperparams(dict(config))
        for number, metrics in rows:
            self.log_metrics(metrics, number)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics that the server does not have."""
        from mlflow.exceptions import MlflowException

        metrics = {name: value for name, value in metrics.items() if (name, step) not in self._stored}
        try:
            if metrics:
                super().log_metrics(metrics, step)
        except MlflowException as error:  # training does not depend on the server
            if not self._warned:
                warn(f"logger.mlflow: the server has not taken metrics ({brief(error)}). metrics.csv has all of them.")
            self._warned = True


class TensorBoard(TensorBoardLogger):
    """TensorBoard's events of a run, in one file."""

    def __init__(self, folder: Path, version: str) -> None:
        """Remove the files of earlier attempts. A TensorBoard that has read them discards their points."""
        super().__init__(folder, name="tensorboard", version=version and make_file_name(version), purge_step=0)
        self._clear()

    @rank_zero_only
    def _clear(self) -> None:
        for earlier in Path(self.log_dir).glob("events.out.tfevents.*"):
            remove(earlier)

    @rank_zero_only
    def replay(self, rows: Sequence[Row]) -> None:
        """Log the rows of metrics.csv."""
        for number, metrics in rows:
            self.log_metrics(metrics, number)
