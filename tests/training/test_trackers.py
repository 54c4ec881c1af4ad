"""W&B, MLflow and TensorBoard have each step of a run once, also after a kill."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import Killed, column, composed, curve
from tests.helpers.trackers import read_mlflow, read_tensorboard, read_wandb
from var.config.run_dir import run_dir
from var.training.checkpoints import Checkpoints
from var.training.loggers import Curves
from var.training.run import Run
from var.training.trackers import MLflow, Wandb

MORE = (
    "data.global_batch=4", "data.micro_batch=2", "trainer.precision=32-true", "trainer.checkpoint_every_n_steps=2",
    "trainer.max_steps=6", "data.validation_prompts=2", "eval.sampling.responses=2", "generate.max_new_tokens=4",
    "eval.every_n_steps=2", "logger=wandb", "logger.wandb.offline=true", "logger.tensorboard={name: ''}",
    "logger.mlflow={experiment: tests, name: null, tracking_uri: null}",
)  # fmt: skip


def train(options: list[str], folder: Path) -> None:
    """Train, and end the trackers as train.py does, which after a kill nobody does."""
    folder.mkdir(exist_ok=True)
    run = Run.compose(composed(*options, *MORE), folder)
    trainer = run.trainer()
    try:
        trainer.fit(run.module(), run.data, ckpt_path=run.checkpoint)
    finally:
        run.close(trainer)


def kill(owner: Any, method: str, call: int, options: list[str], folder: Path, before: bool) -> None:
    """Train until a call of a method, and kill the run before or after it."""
    real, calls = getattr(owner, method), [0]

    def watched(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and before:
            raise Killed
        result = real(*arguments, **named)
        if calls[0] == call:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, watched)
        with pytest.raises(Killed):
            train(options, folder)


def check_trackers(folder: Path) -> None:
    """Assert that both trackers have each row of metrics.csv once."""
    rows = [
        (int(row["step"]), {name: float(text) for name, text in row.items() if text and name != "step"})
        for row in curve(folder)
    ]
    stored, patience = read_wandb(folder), time.monotonic() + 20
    while len(stored) < len(rows) and time.monotonic() < patience:  # W&B's process closes the file after the run
        time.sleep(0.2)
        stored = read_wandb(folder)
    assert [(step, metrics) for _, step, metrics in stored] == rows
    assert {name for name, _, _ in stored} == {(folder / "wandb" / "id").read_text()}
    events, points = read_tensorboard(folder), read_mlflow(folder)
    names = {name for _, metrics in rows for name in metrics}
    assert set(points) == names
    for name in names:
        assert events[name] == points[name] == [step for step, metrics in rows if name in metrics]


@pytest.mark.parametrize(
    ("owner", "method", "call", "before"),
    [
        pytest.param(Checkpoints, "save", 2, True, marks=pytest.mark.long),  # step 4 is logged and not saved
        (Checkpoints, "save", 2, False),  # step 4 is saved and not evaluated
        (Curves, "log_metrics", 7, False),  # step 4 is evaluated, and only metrics.csv has it
    ],
)
@pytest.mark.parametrize("written", [False, pytest.param(True, marks=pytest.mark.long)])
def test_trackers_have_each_step_once_after_a_kill(owner, method, call, before, written, options, tmp_path):
    """A killed process has written some or nothing of what W&B was given: it writes large blocks."""
    folder = tmp_path / "run"
    kill(owner, method, call, options, folder, before=before)
    name, tracked = (folder / "wandb" / "id").read_text(), (folder / "mlflow_run").read_text()
    if not written:
        for path in (*folder.glob("wandb/offline-run-*/*.wandb"), *folder.glob("tensorboard/**/events*")):
            path.write_bytes(path.read_bytes()[:7])
    train(options, folder)
    assert (folder / "wandb" / "id").read_text() == name
    assert (folder / "mlflow_run").read_text() == tracked
    assert column(curve(folder), "step") == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    check_trackers(folder)


class Server:
    """The part of a W&B run that `Wandb` uses, with the summary of what the server has."""

    def __init__(self, summary: dict[str, Any]) -> None:
        self.summary, self.logged = summary, list[dict[str, Any]]()

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)


def test_server_gets_only_what_it_lacks(tmp_path, capsys):
    """It has steps 1 and 2, and of step 2 not the validation. The run resumes from step 3 or, with changes, step 1."""
    server = Server({"trainer/global_step": 2, "train/loss": 0.5})
    rows = [(1, {"train/loss": 0.7}), (2, {"train/loss": 0.5}), (2, {"validation/kl": 1.5}), (3, {"train/loss": 0.25})]
    logger = Wandb(tmp_path, experiment=server)
    logger.replay(rows, 3, changed=True)
    logger.log_metrics({"train/loss": 0.125}, 4)
    assert server.logged == [
        {"validation/kl": 1.5, "trainer/global_step": 2}, {"train/loss": 0.25, "trainer/global_step": 3},
        {"train/loss": 0.125, "trainer/global_step": 4},
    ]  # fmt: skip
    assert "points of steps" not in capsys.readouterr().out
    Wandb(tmp_path, experiment=server).replay(rows[:1], 1, changed=True)
    assert "the points of steps 2 to 2 are from before the settings changed" in " ".join(
        capsys.readouterr().out.split()
    )


def test_training_continues_without_the_mlflow_server(tmp_path, capsys, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    server = {"experiment_name": "tests", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    rows = [(step, {"train/loss": 1 / step}) for step in (1, 2, 3)]

    def start(resumes: bool, step: int, changed: bool = False) -> MLflow:
        logger = MLflow(tmp_path, resumes, **server)
        logger.replay(rows[:step], step, changed, {"seed": 0, "loss": {"temperature": 1.0}})
        return logger

    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("no route")

    def steps(logger: MLflow) -> list[int]:
        return [one.step for one in logger.experiment.get_metric_history(logger.run_id, "train/loss")]

    first = start(False, 1)
    with monkeypatch.context() as patch:
        for name in ("log_batch", "get_run", "set_terminated"):
            patch.setattr(MlflowClient, name, fail)
        first.log_metrics(*rows[1][::-1])
        first.log_metrics(*rows[2][::-1])
        first.finalize("success")
    assert capsys.readouterr().out.count("gets nothing more (no route)") == 1
    second = start(True, 3)
    assert second.run_id == first.run_id
    assert steps(second) == [1, 2, 3]
    assert second.experiment.get_run(second.run_id).data.params == {"seed": "0", "loss/temperature": "1.0"}
    assert "points of steps" not in capsys.readouterr().out
    assert start(True, 1, changed=True).run_id == first.run_id
    assert "the points of steps 2 to 3 are from before the settings changed" in capsys.readouterr().out
    assert start(False, 1).run_id != first.run_id  # resume=false in the same folder
    (tmp_path / "mlflow_run").write_text("0" * 32)
    assert steps(start(True, 2)) == [1, 2]
    assert "does not have the run 0000" in " ".join(capsys.readouterr().out.split())


def test_only_the_first_rank_draws_an_id(tmp_path, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Wandb(tmp_path, offline=True)
    logger.replay([(1, {"train/loss": 0.5})], 1, changed=False)
    logger.log_metrics({"train/loss": 0.5}, 2)
    assert list(tmp_path.iterdir()) == []


def test_new_run_and_jobs_of_a_sweep_have_ids_of_their_own(tmp_path):
    cfg = composed("data=files", "data.path=rows.jsonl", f"runs={tmp_path}")
    again = composed("data=files", "data.path=rows.jsonl", f"runs={tmp_path}", "resume=false")
    job = composed("data=files", "data.path=rows.jsonl", f"runs={tmp_path}", "seed=1")
    folders = [Path(run_dir(str(tmp_path), "m", "d", "l", _root_=each)) for each in (cfg, again, job)]
    for folder in folders:
        folder.mkdir()
    ids = [Wandb(folder, offline=True)._id for folder in folders]
    assert len(set(ids)) == 3
    assert Wandb(folders[0], offline=True)._id == ids[0]
    shutil.rmtree(folders[0] / "wandb")
    assert Wandb(folders[0], offline=True)._id != ids[0]
