"""The files in launch/, run as on a cluster of two machines with one process each: both are this machine, over gloo."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_commands import only, run
from tests.helpers.runs import ROOT, same_folders

pytestmark = pytest.mark.e2e

# What these set is what SLURM's own set in a batch step and in each task of a job step.
SBATCH = """#!{python}
import os, re, shutil, subprocess, sys
at = next(i for i, a in enumerate(sys.argv) if a.endswith(".sh"))
text = open(sys.argv[at]).read()
told = dict(re.findall(r"^#SBATCH --([\\w-]+)=(\\S+)", text, re.M)) | dict(
    a.lstrip("-").split("=") for a in sys.argv[1:at])
nodes, tasks = int(told["nodes"]), int(told["ntasks-per-node"])
os.environ |= {{
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": told["job-name"], "SLURM_JOB_NUM_NODES": str(nodes),
    "SLURM_NNODES": str(nodes), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_NTASKS": str(nodes * tasks),
    "SLURM_NODELIST": f"127.0.0.[1-{{nodes}}]", "SLURM_JOB_NODELIST": f"127.0.0.[1-{{nodes}}]",
    "SLURM_TASKS_PER_NODE": f"{{tasks}}(x{{nodes}})", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}}
spooled = shutil.copy(sys.argv[at], os.path.dirname(__file__) + "/slurm_script")
sys.exit(subprocess.run([spooled, *sys.argv[at + 1 :]]).returncode)
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
    """33 responses beside validation: eight steps of four, and one of a single one, in which one process has none."""
    return [
        "data=files", f"data.path={rows}", f"model.path={tiny_folder}", "reward=score", "loss=var_grouped",
        "trainer.accelerator=cpu", "optim.optimizer.lr=3e-3", "trainer.log_every_n_steps=1", "trainer.epochs=1",
        "data.validation_prompts=2", "data.micro_batch=2", "data.global_batch=4", "data.last_micro_batch=keep",
        "eval.sampling.responses=2", "eval.sampling.max_new_tokens=4",
    ]  # fmt: skip


def at(folder: Path) -> list[str]:
    return [f"annotation_cache={folder}/store", f"cache={folder}/cache", f"runs={folder}/runs"]


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = run("train.py", *options, *at(folder))
    assert done.returncode == 0, done.stderr
    return only(folder / "runs")


def torchrun(node: int, port: int, *overrides: str) -> "subprocess.Popen[str]":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "NODES": "2", "NODE": str(node), "MASTER": "127.0.0.1", "PORT": str(port)}
    return subprocess.Popen(
        [ROOT / "launch" / "torchrun.sh", *overrides], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **environment, "PER_NODE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def by_torchrun(folder: Path, *overrides: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [torchrun(node, port, *overrides) for node in range(2)]
    shown = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(shown)
    return "".join(shown)


def by_slurm(folder: Path, *overrides: str) -> str:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (programs / name).write_text(text.format(python=sys.executable))
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["sbatch", "--nodes=2", "--ntasks-per-node=1", "launch/slurm.sh", *overrides]
    done = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("launch", [pytest.param(by_torchrun, marks=pytest.mark.long), by_slurm])
def test_two_nodes_are_one(launch: Callable[..., str], options: list[str], alone: Path, tmp_path: Path) -> None:
    """The weights and the curve of one process, one folder, and one closing table."""
    shown = launch(tmp_path, *options, *at(tmp_path))
    folder = only(tmp_path / "runs")
    assert json.loads((folder / "summary.json").read_text())["devices"] == 2
    same_folders(alone, folder, "train/loss")
    assert len(re.findall("^Run: ", shown, re.M)) == 1, shown
    assert len(re.findall("^Evaluating the start:", shown, re.M)) == 1, shown


@pytest.mark.parametrize(("status", "queued"), [(138, "requeue 4711\n"), (143, ""), (1, ""), (0, "")])
def test_a_job_that_left_before_its_time_limit_is_queued_again(status: int, queued: str, tmp_path: Path) -> None:
    """One that was pre-empted (143) SLURM queues by itself."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fakes = {"srun": f"exit {status}", "scontrol": f"echo $@ >> {tmp_path}/queued"}
    for name, text in fakes.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    done = subprocess.run(
        [ROOT / "launch" / "slurm.sh"], env={**os.environ, **environment, "PATH": f"{programs}:{os.environ['PATH']}"}
    )
    assert done.returncode == status
    told = tmp_path / "queued"
    assert (told.read_text() if told.exists() else "") == queued
