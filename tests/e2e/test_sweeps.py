"""Sweeps with every launcher and sweeper of the extra `sweep`."""

import importlib.util
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.cli import check_run, read_summaries, read_summary, run, spawn, write_to
from tests.helpers.rewards import OWN_REWARD
from tests.helpers.runs import ROOT, column, curve, run_folder, write_lines
from var.training.module import AlignmentModule

pytestmark = pytest.mark.e2e


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the overrides of a run of four steps, with a reward that they can change."""
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    records = [{"prompt": f"{i}?", "responses": ["abcdefgh", "a", "hgfedc", "bb"]} for i in range(6)]
    rows = write_lines(tmp_path / "rows.jsonl", records)
    return [
        f"model.path={tiny_folder}", *write_to(tmp_path), "data=files", f"data.path={rows}", "reward=exact_number",
        "reward._target_=own_reward.Distinct", "loss=var_grouped", "trainer.accelerator=cpu", "trainer.epochs=1",
        "optim.optimizer.lr=3e-2", "data.validation_prompts=2", "data.micro_batch=2", "data.global_batch=4",
        "eval.sampling.responses=2", "eval.sampling.max_new_tokens=6",
    ]  # fmt: skip


def require(plugin: str) -> None:
    """Skip the test if a Hydra plugin is not installed."""
    if importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed: pip install -e '.[sweep]'")


def finished(tmp_path: Path) -> dict[float, Path]:
    """Return the folder of each finished run by its λ."""
    summaries = read_summaries(tmp_path / "runs")
    return {summary["config"]["loss"]["temperature"]: folder for folder, summary in summaries.items()}


def sweep(*overrides: str) -> None:
    """Run `python train.py -m …` in a process of its own, since a launcher sends the entry point to others."""
    process = spawn(str(ROOT / "train.py"), "-m", *overrides)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err


@pytest.mark.long
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
        ("hydra_ray_launcher", ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]),
    ],
)
def test_jobs_run_in_parallel(plugin: str, launcher: list[str], own: list[str], tmp_path: Path) -> None:
    """Two jobs that start together on an empty annotation cache both finish, each in its folder."""
    require(plugin)
    sweep(*launcher, *own, "loss.temperature=0.5,1")
    runs = finished(tmp_path)
    assert set(runs) == {0.5, 1.0}
    assert len(set(runs.values())) == 2
    for folder in runs.values():
        assert (folder / "model" / "model.safetensors").exists()


def test_optuna_finds_the_highest_reward(own: list[str], tmp_path: Path) -> None:
    require("hydra_optuna_sweeper")
    printed = check_run(
        "train.py", "-m", *own, "hydra/sweeper=max_reward", "hydra.sweeper.n_trials=3",
        "loss.temperature=tag(log,interval(0.1,3))",
    )  # fmt: skip
    runs = finished(tmp_path)
    rewards = {read_summary(folder)["reward"]: temperature for temperature, folder in runs.items()}
    assert len(runs) == 3
    assert len(rewards) > 1, "all trials have the same reward, so this test shows nothing"
    best = yaml.safe_load((tmp_path / "runs" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(rewards)
    assert best["best_params"] == {"loss.temperature": rewards[max(rewards)]}
    assert "Best parameters: {'loss.temperature': " in printed


def test_job_after_a_failed_one_has_its_own_tracker_run(own: list[str], tmp_path: Path) -> None:
    """Otherwise it would log to the W&B run of the failed job (wandb #1314)."""
    with pytest.raises(ValueError, match="Invalid learning rate"):
        run("train.py", "-m", *own, "logger=wandb", "optim.optimizer.lr=-1,3e-2")
    assert len(finished(tmp_path)) == 1
    assert len({path.parents[1] for path in (tmp_path / "runs").glob("*/wandb/offline-run-*")}) == 2


def test_job_leaves_nothing_in_memory(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a sweep of ten jobs holds ten models with their optimizers.

    A signal handler once kept each job's trainer alive.
    """
    handler, modules, alive = signal.getsignal(signal.SIGTERM), list[Any](), list[int]()
    init = AlignmentModule.__init__

    def count(self: AlignmentModule, *arguments: Any) -> None:
        alive.append(sum(module() is not None for module in modules))
        init(self, *arguments)
        modules.append(weakref.ref(self))

    monkeypatch.setattr(AlignmentModule, "__init__", count)
    check_run("train.py", "-m", *own, "loss.temperature=0.5,1,2")
    assert alive == [0, 0, 0]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.long
def test_each_job_has_two_ranks(own: list[str], tmp_path: Path) -> None:
    """The launcher starts both ranks of each job, and one of them logs (hydra #2070, Lightning PR #18175)."""
    require("hydra_submitit_launcher")
    check_run("train.py", *own, f"runs={tmp_path}/single", "loss.temperature=0.5")
    sweep(
        "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", *own, "trainer.devices=2", "strategy=ddp",
        "loss.temperature=0.5,1", "logger=wandb",
    )  # fmt: skip
    runs = finished(tmp_path)
    assert set(runs) == {0.5, 1.0}
    for folder in runs.values():
        assert read_summary(folder)["devices"] == 2
        assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    single, double = (column(curve(folder), "train/loss") for folder in (run_folder(tmp_path / "single"), runs[0.5]))
    assert single == pytest.approx(double, rel=1e-3)
