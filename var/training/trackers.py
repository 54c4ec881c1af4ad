"""W&B, MLflow and TensorBoard over several attempts of one run: each step once, and none missing.

metrics.csv has the steps up to the checkpoint that a run resumes from. What a killed attempt passed to a tracker can be
more, and what the tracker has stored can be less: W&B writes its offline file in large blocks. So a resumed run starts
new files with the contents of metrics.csv, and sends W&B's server only what it lacks. Points from before the resume get
its time.
"""

import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from var.utils.console import warn
from var.utils.errors import brief
from var.utils.files import atomic, make_file_name, remove

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Unless the user sets them. MLflow's own would let a step wait for minutes."""

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
    """An MLflow run whose id is kept in the run's folder, so that a resumed run continues it.

    Training does not depend on the server: after its first failure nothing more is sent, and the next attempt sends
    what it lacks.
    """

    def __init__(self, folder: Path, resumes: bool, **options: Any) -> None:
        """Read the id of an earlier attempt if the run resumes. `options` are MLFlowLogger's."""
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        self._path, self._failed, self._stored = folder / "mlflow_run", False, set[tuple[str, int]]()
        name = self._path.read_text(errors="replace") if resumes and self._path.exists() else ""
        super().__init__(run_id=name if re.fullmatch("[0-9a-f]{32}", name) else None, **options)

    @rank_zero_only
    def replay(self, rows: Sequence[Row], step: int, changed: bool, config: Mapping[str, Any]) -> None:
        """Log the rows of metrics.csv that the server lacks, and the configuration of a new run.

        MLflow's parameters cannot change, so a resumed run keeps those of its first attempt.

        Args:
            rows: of metrics.csv, up to `step`.
            step: of the checkpoint that the run resumes from.
            changed: whether its settings differ from those of the earlier attempt.
            config: the configuration.
        """
        from mlflow.exceptions import MlflowException

        if self._run_id is not None:
            try:
                self._continue(step, changed)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                warn(f"logger.mlflow: the server does not have the run {self._run_id}; a new one starts.")
                self._run_id = None
        if self._run_id is None:
            try:
                new = self.run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job has made the experiment
                    raise
                new = self.run_id
            assert new is not None
            with atomic(self._path) as file:
                file.write(new)
            self.log_hyperparams(dict(config))
        for number, metrics in rows:
            self.log_metrics(metrics, number)

    def _continue(self, step: int, changed: bool) -> None:
        client, run = self.experiment, self._run_id
        assert run is not None
        for name in client.get_run(run).data.metrics:
            self._stored |= {(name, one.step) for one in client.get_metric_history(run, name)}
        client.update_run(run, status="RUNNING")
        last = max((at for _, at in self._stored), default=-1)
        if changed and last > step:
            warn(
                f"logger.mlflow: the points of steps {step + 1} to {last} are from before the settings changed. MLflow "
                "does not replace points; metrics.csv has the new ones."
            )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics that the server does not have."""
        if metrics := {name: value for name, value in metrics.items() if (name, step) not in self._stored}:
            self._send(lambda: super(MLflow, self).log_metrics(metrics, step))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the MLflow run."""
        self._send(lambda: super(MLflow, self).finalize(status))

    def _send(self, send: Callable[[], None]) -> None:
        from mlflow.exceptions import MlflowException

        if self._failed:
            return
        try:
            send()
        except MlflowException as error:
            self._failed = True
            warn(
                f"logger.mlflow: the server does not answer, and gets nothing more ({brief(error)}). metrics.csv has "
                "all metrics."
            )


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
