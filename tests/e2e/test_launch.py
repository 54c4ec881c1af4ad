"""The scripts in launch/, on a simulated cluster: two nodes with one process each, both on this machine, over gloo."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.cli import check_run, read_summary, write_to
from tests.helpers.runs import ROOT, run_folder, same_folders

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
    "SLURM_TASKS_PER_NODE": f"{{tasks}}(x{{nodes}})", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}}
script = shutil.copy(sys.argv[at], os.path.dirname(__file__) + "/slurm_script")
sys.exit(subprocess.run([script, *sys.argv[at + 1 :]]).returncode)
"""
SRUN = """#!{python}
import os, subprocess, sys
nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
started = [
    subprocess.Popen(sys.argv[1:], env=os.environ | {{
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


def launch_with_torchrun(folder: Path, *overrides: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"NODES": "2", "PER_NODE": "1", "MASTER": "127.0.0.1", "PORT": str(port)}
    environment["PATH"] = write_programs(folder / "bin")
    return finish(*(start(["launch/torchrun.sh", *overrides], NODE=str(node), **environment) for node in range(2)))


def launch_with_slurm(folder: Path, *overrides: str) -> str:
    texts = {name: text.format(python=sys.executable) for name, text in (("sbatch", SBATCH), ("srun", SRUN))}
    path = write_programs(folder / "bin", **texts)
    command = ["sbatch", "--nodes=2", "--ntasks-per-node=1", "launch/slurm.sh", *overrides]
    return finish(start(command, PATH=path))


@pytest.mark.parametrize("launch", [pytest.param(launch_with_torchrun, marks=pytest.mark.long), launch_with_slurm])
def test_two_nodes_equal_one(launch: Callable[..., str], options: list[str], single: Path, tmp_path: Path) -> None:
    """Two nodes give the weights and the curve of one process, one folder, and one closing table."""
    printed = launch(tmp_path, *options, *write_to(tmp_path))
    folder = run_folder(tmp_path / "runs")
    assert read_summary(folder)["devices"] == 2
    same_folders(single, folder, "train/loss")
    assert len(re.findall("^Run: ", printed, re.M)) == 1, printed
    assert len(re.findall("^Evaluating the reference:", printed, re.M)) == 1, printed


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
