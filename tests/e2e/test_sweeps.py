"""Sweeps with every launcher and sweeper of the extra `sweep`."""

import importlib.util
import itertools
import json
import re
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig

from tests.helpers.cli import check_error, check_run, read_summaries, read_summary, run, spawn, write_to
from tests.helpers.rewards import OWN_REWARD
from tests.helpers.runs import ROOT, column, curve, run_folder, write_lines
from var.config.sweep import show_results
from var.training.module import AlignmentModule

pytestmark = pytest.mark.e2e

TWO = ["trainer.devices=2", "strategy=ddp", "data.micro_batch=4"]

# A reward that fails with seed 1 until a file exists.
SWITCHED = """
from dataclasses import dataclass
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from var.rewards import dataset_score
from var.utils.errors import UserError

@dataclass(frozen=True, kw_only=True)
class Score(dataset_score.Score):
    def __post_init__(self):
        if "seed=1" in HydraConfig.get().overrides.task and not Path({switch!r}).exists():
            raise UserError("the server is down")
"""

# Every Python process of the test starts with this: a job's processes note their devices, and the others pretend GPUs.
SITE = """
import atexit, json, os, sys, time
job = [word for word in sys.orig_argv if word.startswith("hydra.run.dir=")]
if job:
    note = {{"job": job[0], "devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "start": time.time()}}
    def write():
        with open({log!r}, "a") as file:
            file.write(json.dumps(note | {{"end": time.time()}}) + chr(10))
    atexit.register(write)
else:
    import var.config.sweep
    var.config.sweep.list_devices = lambda cfg: ["0", "1", "2", "3"]
"""


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


def sweep(*overrides: str) -> str:
    """Run `python train.py -m …` in a process of its own, since a launcher sends the entry point to others.

    Return what it has printed.
    """
    process = spawn(str(ROOT / "train.py"), "-m", *overrides)
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, out + err
    return out


def test_table_of_a_sweep_has_the_jobs_with_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {
        "a": {"validation": {"reward": {"before": None, "after": {"mean": 0.5, "se": 0.1}, "gain": {"mean": 0.25}}}},
        "b": {"validation": {}},  # eval=off
        "c": {"validation": {"accuracy": {"after": {"mean": 0.75}}}},
        "d": None,  # damaged, or of another command
    }
    for name, result in results.items():
        (tmp_path / name).mkdir()
        known = {"config": {}, "folder": "", "hashes": {"weights": ""}, "reward": None, "kl": None, "steps": 7}
        (tmp_path / name / "summary.json").write_text(json.dumps(result and {**known, **result}))
    show_results([{"job": f"#{name}", "folder": str(tmp_path / name)} for name in (*results, "absent")])
    rows = [re.split(" *│ *", line)[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert rows == [
        ["#a", "0.500 ± 0.100", "0.250", "–", "7"], ["#b", "–", "–", "–", "7"], ["#c", "0.750", "–", "–", "7"],
    ]  # fmt: skip
    show_results([{"job": "#a", "folder": str(tmp_path / "a")}])
    assert capsys.readouterr().out == ""


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
    printed = sweep(*launcher, *own, "loss.temperature=0.5,1")
    if plugin == "hydra_joblib_launcher":  # submitit writes what a job prints to a file, and ray adds a prefix
        for job in (0, 1):
            assert f"#{job} Training: 4 steps" in printed
    assert re.findall("#[01]|loss.temperature=[0-9.]+", printed.rpartition("Sweep")[2]) == [
        "#0", "loss.temperature=0.5", "#1", "loss.temperature=1",
    ]  # fmt: skip
    runs = finished(tmp_path)
    assert set(runs) == {0.5, 1.0}
    assert len(set(runs.values())) == 2
    for folder in runs.values():
        assert (folder / "model" / "model.safetensors").exists()


@pytest.mark.long
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
    assert re.findall("#[0-9]+", printed.rpartition("Sweep")[2]) == ["#0", "#1", "#2"]


def test_failed_trials_do_not_stop_optuna(options: list[str]) -> None:
    require("hydra_optuna_sweeper")
    done = run(
        "train.py", "-m", *options, "loss=var_grouped", "hydra/sweeper=max_reward", "hydra.sweeper.n_trials=2",
        "loss.temperature=interval(-2,-1)",
    )  # fmt: skip
    assert done.returncode == 1
    failed = list_failed(done.stderr)
    assert [job.partition("=")[0] for job in failed] == ["0 loss.temperature", "1 loss.temperature"]
    assert all(error.startswith("loss.temperature must be above 0, got -1.") for error in failed.values())
    assert done.stderr.endswith("Error: ValueError: No trials are completed yet.\n")


@pytest.mark.long
def test_job_after_a_failed_one_has_its_own_tracker_run(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would log to the W&B run of the failed job (wandb #1314)."""
    configure = AlignmentModule.configure_optimizers

    def fail_once(self: AlignmentModule) -> Any:
        if HydraConfig.get().job.num == 0:
            raise ValueError("a fault in the code")
        return configure(self)

    monkeypatch.setattr(AlignmentModule, "configure_optimizers", fail_once)
    done = run("train.py", "-m", *own, "logger=wandb", "seed=0,1")
    assert done.returncode == 1
    assert list_failed(done.stderr) == {"0 seed=0": "ValueError: a fault in the code"}
    assert "Traceback" in done.stderr, "the user cannot fix this error"
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


def list_failed(errors: str) -> dict[str, str]:
    """Return the error of each failed job by the job's number and overrides, as the end of a sweep lists them."""
    found = re.findall(r"^#(.+)\n    (.+)(?:\n    (.+))?$", errors.split("Failed jobs:")[1], re.M)
    assert all(Path(folder).is_dir() for *_, folder in found if folder)  # of those that wrote something
    return {job: error for job, error, _ in found}


def test_failed_jobs_do_not_stop_the_others(options: list[str], tmp_path: Path) -> None:
    """Also not the next batch. All failures are listed, and the same command runs only those again."""
    switch = tmp_path / "works"
    (tmp_path / "switched.py").write_text(SWITCHED.format(switch=str(switch)))
    command = [
        "train.py", "-m", *options, "loss=var_grouped", "trainer.max_steps=1", "hydra.sweeper.max_batch_size=2",
        "reward._target_=switched.Score", "loss.temperature=0.5,-1,1", "seed=0,1",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        done = run(*command)
        assert done.returncode == 1
        negative = "loss.temperature must be above 0, got -1. For λ → ∞ use loss=sft."
        broken = "the server is down"
        assert list_failed(done.stderr) == {
            "1 loss.temperature=0.5 seed=1": broken,
            "2 loss.temperature=-1 seed=0": negative,
            "3 loss.temperature=-1 seed=1": negative,
            "5 loss.temperature=1 seed=1": broken,
        }
        assert done.stderr.endswith(
            "Error: failed jobs: 4. The same command runs them again and skips finished jobs.\n"
        )
        assert len(read_summaries(tmp_path / "runs")) == 2
        switch.touch()
        done = run(*command)
    assert set(list_failed(done.stderr).values()) == {negative}
    assert done.stdout.count("Run already finished") == 2
    assert len(read_summaries(tmp_path / "runs")) == 4
    assert not list((tmp_path / "runs").glob(".failures*"))


@pytest.mark.long
def test_all_failed_jobs_of_joblib_are_listed(options: list[str], tmp_path: Path) -> None:
    """The workers are other processes, and both fail."""
    require("hydra_joblib_launcher")
    command = [
        str(ROOT / "train.py"), "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *options, "loss=var_grouped",
        "trainer.max_steps=1", "loss.temperature=-1,1,-2",
    ]  # fmt: skip
    process = spawn(*command)
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 1
    assert list_failed(err) == {
        f"{job} loss.temperature={value}": f"loss.temperature must be above 0, got {value}. For λ → ∞ use loss=sft."
        for job, value in ((0, -1), (2, -2))
    }
    assert err.endswith("Error: failed jobs: 2. The same command runs them again and skips finished jobs.\n")
    assert len(read_summaries(tmp_path / "runs")) == 1


@pytest.mark.long
def test_each_job_of_a_sweep_runs_on_two_processes(options: list[str], tmp_path: Path) -> None:
    """With the default launcher. The folder's name needs quotes."""
    runs = tmp_path / "the runs, 'mine'"
    command = [
        "train.py", "-m", *options, rf"runs='{tmp_path}/the runs, \'mine\''", "loss=var_grouped", "trainer.max_steps=1",
        "loss.temperature=0.5,-1,1", *TWO,
    ]  # fmt: skip
    done = run(*command, RANK="0", WORLD_SIZE="1", SLURM_NTASKS="1", SLURM_JOB_NAME="sweep")  # of a SLURM batch job
    assert done.returncode == 1
    error = "loss.temperature must be above 0, got -1. For λ → ∞ use loss=sft."
    assert list_failed(done.stderr) == {"1 loss.temperature=-1": error}
    summaries = read_summaries(runs)
    assert [summary["devices"] for summary in summaries.values()] == [2, 2]
    assert {summary["config"]["loss"]["temperature"] for summary in summaries.values()} == {0.5, 1}
    assert run(*command).stdout.count("Run already finished") == 2


@pytest.mark.parametrize(
    ("message", "more", "environment"),
    [
        ("trainer.devices=auto: with hydra/launcher=joblib, jobs share the 2 GPUs", [], {}),
        ("trainer.devices=3: only 2 GPUs are visible: 4, 7", ["trainer.devices=3"], {}),
        ("trainer.num_nodes=2: this launcher runs a job on one machine", ["trainer.num_nodes=2"], {}),
        ("-m on 2 processes: each process would run the complete sweep", [], {"RANK": "0", "WORLD_SIZE": "2"}),
    ],
)
def test_impossible_devices_of_a_job_are_an_error(
    message: str, more: list[str], environment: dict[str, str], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("var.config.sweep._find_launcher", lambda: "joblib")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    where = ["trainer.accelerator=auto", "trainer.precision=auto", "hydra/launcher=basic", *more]
    printed = check_error(message, "-m", *options, *where, CUDA_VISIBLE_DEVICES="4,7", **environment)
    assert list_failed(printed)


@pytest.mark.long
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
    ],
)
def test_parallel_jobs_never_share_a_device(
    plugin: str, launcher: list[str], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run three jobs of two processes as if there were four GPUs. Each process notes its devices and time."""
    require(plugin)
    (tmp_path / "sitecustomize.py").write_text(SITE.format(log=str(tmp_path / "log")))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    sweep(
        *launcher, *options, "loss=sft", "trainer.max_steps=1", "seed=0,1,2", *TWO,
    )  # fmt: skip
    assert [summary["devices"] for summary in read_summaries(tmp_path / "runs").values()] == [2, 2, 2]
    used = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(used) == 6
    assert {process["devices"] for process in used} <= {"0,1", "2,3", "0,2", "0,3", "1,2", "1,3"}
    for one, two in itertools.combinations(used, 2):
        if one["job"] != two["job"] and set(one["devices"]) & set(two["devices"]) - {","}:
            assert one["end"] < two["start"] or two["end"] < one["start"], (one, two)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_sweep_reaches_its_job(
    number: signal.Signals, options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The job ends with the sweep, also if the sweep is killed. The same command finishes it."""
    command = [
        str(ROOT / "train.py"), "-m", *options, "loss=sft", "trainer.epochs=60", *TWO,
    ]  # fmt: skip
    process = spawn(*command)
    while not list((tmp_path / "runs").glob("*/metrics.csv")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=1800)  # until the job has closed its output, too
    assert f"Received {'SIGINT' if number == signal.SIGINT else 'SIGTERM'}; saved step" in out, out + err
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: -2, signal.SIGKILL: -9}[number], err
    assert not read_summaries(tmp_path / "runs")
    check_run("train.py", *command[1:])
    assert "Resuming from" in capfd.readouterr().out  # the job's process prints it
    assert [summary["steps"] for summary in read_summaries(tmp_path / "runs").values()] == [300]


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
