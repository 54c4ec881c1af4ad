"""Sweeps: each launcher and sweeper that the extra brings, each job with its folder, its summary and its ranks."""

import importlib.util
import json
import re
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_commands import OWN_REWARD, run, spawn
from tests.helpers.runs import ROOT
from var.training.module import AlignmentModule

pytestmark = pytest.mark.e2e


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of four steps, its reward a program that a few steps can move."""
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    answers = ["abcdefgh", "a", "hgfedc", "bb"]
    rows.write_text("\n".join(json.dumps({"prompt": f"{i}?", "responses": answers}) for i in range(6)))
    return [
        f"model.path={tiny_folder}",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", f"runs={tmp_path}/runs",
        "data=files", f"data.path={rows}", "reward=exact_number", "reward._target_=own_reward.Distinct",
        "loss=var_grouped", "trainer.accelerator=cpu", "trainer.epochs=1", "optim.optimizer.lr=3e-2",
        "data.validation_prompts=2", "data.micro_batch=2", "data.global_batch=4", "eval.sampling.responses=2",
        "eval.sampling.max_new_tokens=6",
    ]  # fmt: skip


def needs(plugin: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed: pip install -e '.[sweep]'")


def finished(tmp_path: Path) -> dict[float, Path]:
    """λ of each finished run, and its folder."""
    folders = [path.parent for path in (tmp_path / "runs").glob("*/summary.json")]
    return {json.loads((f / "summary.json").read_text())["config"]["loss"]["temperature"]: f for f in folders}


def swept(*overrides: str) -> str:
    """`python train.py -m …` in a process of its own, since a launcher sends the entry point to others."""
    process = spawn(str(ROOT / "train.py"), "-m", *overrides)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    return out


@pytest.mark.long
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
        ("hydra_ray_launcher", ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]),
    ],
)
def test_jobs_side_by_side(plugin: str, launcher: list[str], own: list[str], tmp_path: Path) -> None:
    """Two λ in two processes that start together on an empty store: both finish, each in its folder."""
    needs(plugin)
    swept(*launcher, *own, "loss.temperature=0.5,1")
    runs = finished(tmp_path)
    assert set(runs) == {0.5, 1.0}
    assert len(set(runs.values())) == 2
    for folder in runs.values():
        assert (folder / "model" / "model.safetensors").exists()


def test_optuna_finds_the_highest_reward(own: list[str], tmp_path: Path) -> None:
    """Three trials; the best is printed and kept, and it is the highest reward, not the lowest."""
    needs("hydra_optuna_sweeper")
    done = run(
        "train.py", "-m", *own, "hydra/sweeper=max_reward", "hydra.sweeper.n_trials=3",
        "loss.temperature=tag(log,interval(0.1,3))",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = finished(tmp_path)
    rewards = {json.loads((f / "summary.json").read_text())["reward"]: t for t, f in runs.items()}
    assert len(runs) == 3
    assert len(rewards) > 1, "the trials are worth the same, so that this shows nothing"
    best = yaml.safe_load((tmp_path / "runs" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(rewards)
    assert best["best_params"] == {"loss.temperature": rewards[max(rewards)]}
    assert "Best parameters: {'loss.temperature': " in done.stdout


def test_a_job_that_fails_leaves_the_next_its_own_tracker_run(own: list[str], tmp_path: Path) -> None:
    """Else the jobs after it would log into its W&B run (wandb #1314)."""
    with pytest.raises(ValueError, match="Invalid learning rate"):
        run("train.py", "-m", *own, "logger=wandb", "optim.optimizer.lr=-1,3e-2")
    assert len(finished(tmp_path)) == 1
    assert len({path.parents[1] for path in (tmp_path / "runs").glob("*/wandb/offline-run-*")}) == 2


def test_a_job_leaves_nothing_in_memory(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a sweep of ten holds ten models with their optimisers; a signal handler once kept each job's trainer."""
    before, made, alive = signal.getsignal(signal.SIGTERM), list[Any](), list[int]()
    begin = AlignmentModule.__init__

    def counted(self: AlignmentModule, *given: Any) -> None:
        alive.append(sum(one() is not None for one in made))
        begin(self, *given)
        made.append(weakref.ref(self))

    monkeypatch.setattr(AlignmentModule, "__init__", counted)
    done = run("train.py", "-m", *own, "loss.temperature=0.5,1,2")
    assert done.returncode == 0, done.stderr
    assert alive == [0, 0, 0]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.long
def test_two_ranks_a_job(own: list[str], tmp_path: Path) -> None:
    """hydra #2070, Lightning PR #18175: the launcher starts both ranks of both jobs, and one of each job tracks."""
    needs("hydra_submitit_launcher")
    alone = run("train.py", *own, f"runs={tmp_path}/alone", "loss.temperature=0.5")
    assert alone.returncode == 0, alone.stderr
    swept(
        "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", *own, "trainer.devices=2", "strategy=ddp",
        "loss.temperature=0.5,1", "logger=wandb",
    )  # fmt: skip
    runs = finished(tmp_path)
    assert set(runs) == {0.5, 1.0}
    for folder in runs.values():
        assert json.loads((folder / "summary.json").read_text())["devices"] == 2
        assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    (one,) = (tmp_path / "alone").glob("*/metrics.csv")
    losses = [
        [float(x) for x in re.findall(r"^\d+,([\d.e-]+),", path.read_text(), re.M)]
        for path in (one, runs[0.5] / "metrics.csv")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
