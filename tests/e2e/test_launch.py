"""The scripts in launch/, on a simulated cluster: two nodes with one process each, both on this machine, over gloo."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.cli import check_run, read_summary, write_to
from tests.helpers.runs import ROOT, composed, run_folder, same_folders

pytestmark = pytest.mark.e2e

# Stand-ins for SLURM's programs. They set the variables that SLURM sets in a batch step and in each task of a job step.
SBATCH = """#!{python}
import os, re, shutil, subprocess, sys
at = next(i for i, a in enumerate(sys.argv) if a.endswith(".sh"))
text = open(sys.argv[at]).read()
options = dict(re.findall(r"^#SBATCH --([\\w-]+)=(\\S+)", text, re.M)) | dict(
    a.lstrip("-").split("=") for a in sys.argv[1:at])
nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
os.environ |= {{
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": options["job-name"], "SLURM_JOB_NUM_NODES": str(nodes),
    "SLURM_NNODES": str(nodes), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_NTASKS": str(nodes * tasks),
    "SLURM_NODELIST": f"127.0.0.[1-{{nodes}}]", "SLURM_JOB_NODELIST": f"127.0.0.[1-{{nodes}}]",
    "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
    "SLURM_TASKS_PER_NODE": f"{{tasks}}(x{{nodes}})", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}}
script = shutil.copy(sys.argv[at], os.path.dirname(__file__) + "/slurm_script")
sys.exit(subprocess.run([script, *sys.argv[at + 1 :]]).returncode)
"""
SRUN = """#!{python}
import os, subprocess, sys
nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
assert os.environ["SRUN_CPUS_PER_TASK"] == os.environ["SLURM_CPUS_PER_TASK"]
command = [word for word in sys.argv[1:] if not word.startswith("--")]
started = [
    subprocess.Popen(command, env=os.environ | {{
        "SLURM_STEP_ID": "0", "SLURM_PROCID": str(n * tasks + t), "SLURM_LOCALID": str(t), "SLURM_NODEID": str(n)}})
    for n in range(nodes) for t in range(tasks)
]
sys.exit(max(abs(process.wait()) for process in started))
"""


@pytest.fixture(scope="module")
def options(rows: Path, tiny_folder: Path) -> list[str]:
    """Return the overrides of a run on 33 responses: 8 steps of 4, and one of 1, which leaves a process without any."""
    return [
        "data=files", f"data.path={rows}", f"model.path={tiny_folder}", "reward=score", "loss=var_grouped",
        "trainer.accelerator=cpu", "optim.optimizer.lr=3e-3", "trainer.log_every_n_steps=1", "trainer.epochs=1",
        "data.validation_prompts=2", "data.micro_batch=2", "data.global_batch=4", "data.last_micro_batch=keep",
        "eval.sampling.responses=2", "eval.sampling.max_new_tokens=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def single(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run in a single process."""
    folder = tmp_path_factory.mktemp("single")
    check_run("train.py", *options, *write_to(folder))
    return run_folder(folder / "runs")


def write_programs(folder: Path, **programs: str) -> str:
    """Write executable scripts; return a PATH on which they and this Python come first."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def start(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    """Start a command in the repository's root folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)


def finish(*processes: "subprocess.Popen[str]") -> str:
    """Wait for processes, assert that they succeed, and return what they printed."""
    printed = "".join(process.communicate(timeout=300)[0] for process in processes)
    assert not any(process.returncode for process in processes), printed
    return printed


def find_port() -> str:
    """Return a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch_with_torchrun(folder: Path, *overrides: str) -> str:
    environment = {"NODES": "2", "PER_NODE": "1", "MASTER": "127.0.0.1", "PORT": find_port()}
    environment["PATH"] = write_programs(folder / "bin")
    return finish(*(start(["launch/torchrun.sh", *overrides], NODE=str(node), **environment) for node in range(2)))


def launch_with_slurm(folder: Path, *overrides: str) -> str:
    texts = {name: text.format(python=sys.executable) for name, text in (("sbatch", SBATCH), ("srun", SRUN))}
    path = write_programs(folder / "bin", **texts)
    command = ["sbatch", "--nodes=2", "--ntasks-per-node=1", "launch/slurm.sh", *overrides]
    return finish(start(command, PATH=path))


@pytest.mark.parametrize("launch", [launch_with_torchrun, launch_with_slurm])
@pytest.mark.long
def test_two_nodes_equal_one(launch: Callable[..., str], options: list[str], single: Path, tmp_path: Path) -> None:
    """Two nodes give the weights and the curve of one process, one folder, and one closing table."""
    printed = launch(tmp_path, *options, *write_to(tmp_path))
    folder = run_folder(tmp_path / "runs")
    assert read_summary(folder)["devices"] == 2
    same_folders(single, folder, "train/loss")
    assert len(re.findall("^Run: ", printed, re.M)) == 1, printed
    assert len(re.findall("^Evaluating the reference:", printed, re.M)) == 1, printed


@pytest.mark.long
def test_annotate_runs_on_two_nodes(options: list[str], tmp_path: Path) -> None:
    """The first word names the program. Both nodes compute, and a run with annotate=error finds everything."""
    words = [*options, "loss=var", "reward.mismatch_gap=1", "data.global_batch=8", *write_to(tmp_path)]
    printed = launch_with_slurm(tmp_path, "annotate.py", *words)
    assert re.search("Computed: .*cross log-probabilities", printed), printed
    shards = list((tmp_path / "store" / "cross_logps").rglob("*.arrow"))
    assert len(shards) == 2, shards
    check_run("train.py", *words, "annotate=error", "trainer.max_steps=1")


SLOW_REWARD = """
import os, time
from pathlib import Path

class Slow:
    \"\"\"The length of a response. With SLOW, the second rank takes an hour, once both have begun.\"\"\"
    scores_text = True
    fingerprint = {"program": "length"}

    def __call__(self, prompts, responses, answers):
        if folder := os.environ.get("SLOW"):
            Path(folder, os.environ["RANK"]).touch()
            if os.environ["RANK"] == "1":
                time.sleep(3600)
        return [float(len(response)) for response in responses]
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
@pytest.mark.long
def test_all_ranks_leave_on_a_signal_while_they_annotate(number: int, options: list[str], tmp_path: Path) -> None:
    """The first rank waits for the second one. Both end with 128 plus the signal; what the first computed is kept."""
    (tmp_path / "slow_reward.py").write_text(SLOW_REWARD)
    reward = ["reward=exact_number", "reward._target_=slow_reward.Slow", "trainer.devices=2"]
    command = [sys.executable, "annotate.py", *options, *reward, *write_to(tmp_path)]

    def start_ranks(**more: str) -> list["subprocess.Popen[str]"]:
        job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_port()}
        ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1"))
        return [start(command, PYTHONPATH=str(tmp_path), **job, **rank, **more) for rank in ranks]

    ranks = start_ranks(SLOW=str(tmp_path))
    until = time.monotonic() + 240
    while not ((tmp_path / "1").exists() and list((tmp_path / "store" / "rewards").rglob("*.arrow"))):
        assert time.monotonic() < until
        assert [rank.poll() for rank in ranks] == [None, None], ranks[0].communicate()[0]
        time.sleep(0.1)
    time.sleep(1)  # the first rank reaches the barrier
    for rank in ranks:
        rank.send_signal(number)
    printed = "".join(rank.communicate(timeout=60)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [128 + number] * 2, printed
    assert printed.count("Received") == 1, printed
    assert "Traceback" not in printed, printed
    printed = finish(*start_ranks())
    assert "Scoring: 0" not in printed
    # of each rank: rewards of the training responses, and of the reference's answers
    assert len(list((tmp_path / "store" / "rewards").rglob("*.arrow"))) == 4, printed


def test_slurm_preset_asks_for_what_a_job_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hydra/launcher=slurm: the options of sbatch that submitit writes, for a job on two machines with four GPUs."""
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        pytest.skip("hydra_submitit_launcher is not installed: pip install -e '.[sweep]'")
    import submitit

    path = write_programs(tmp_path / "bin", srun="#!/bin/sh\n", sbatch="#!/bin/sh\necho Submitted batch job 4711\n")
    monkeypatch.setenv("PATH", path)
    words = ["hydra/launcher=slurm", "trainer.devices=4", "trainer.num_nodes=2", "hydra.launcher.partition=gpu"]
    cfg = composed(*words, return_hydra_config=True)
    skipped = ("_target_", "submitit_folder")
    settings = {key: cfg.hydra.launcher[key] for key in cfg.hydra.launcher if key not in skipped}
    settings |= {"name": "var", "additional_parameters": {}}
    common = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
              "stderr_to_stdout"}  # fmt: skip
    executor = submitit.AutoExecutor(tmp_path, "slurm", slurm_max_num_timeout=settings.pop("max_num_timeout"))
    executor.update_parameters(**{k if k in common else f"slurm_{k}": v for k, v in settings.items()})
    executor.submit(print)
    script = (tmp_path / "4711_submission.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.M))
    expected = {"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "8", "time": "1440",
                "partition": "gpu"}  # fmt: skip
    assert expected.items() <= options.items(), options
    assert options["signal"].endswith("@300"), options


@pytest.mark.parametrize(("status", "queued"), [(138, "requeue 4711\n"), (143, ""), (1, ""), (0, "")])
def test_job_is_requeued_before_its_time_limit(status: int, queued: str, tmp_path: Path) -> None:
    """Only after SIGUSR1 (138). SLURM itself requeues a job that was preempted (143)."""
    log = tmp_path / "queued"
    programs = {"srun": f"#!/bin/sh\nexit {status}\n", "scontrol": f"#!/bin/sh\necho $@ >> {log}\n"}
    environment = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    job = start(["launch/slurm.sh"], PATH=write_programs(tmp_path / "bin", **programs), **environment)
    job.communicate()
    assert job.returncode == status
    assert (log.read_text() if log.exists() else "") == queued
