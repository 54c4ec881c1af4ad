"""sample.py on several ranks and on Ray: the same file as from one process, and each response computed once."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import check_run
from tests.helpers.runs import ROOT, launch, write_lines

pytestmark = pytest.mark.e2e


def words_of(folder: Path, model: Path, name: str) -> list[str]:
    """Return the overrides of sample.py on 40 prompts, with caches of their own."""
    prompts = write_lines(folder / "prompts.jsonl", [{"id": str(i), "prompt": f"Number {i}?"} for i in range(40)])
    return [
        "data=prompts", f"data.path={prompts}", f"model.path={model}", "reward=score", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "generate.responses=2", "generate.max_new_tokens=8", f"out={folder}/{name}.jsonl",
        f"cache={folder}/{name}-cache", f"annotation_cache={folder}/{name}-annotations",
    ]  # fmt: skip


def test_ranks_sample_what_one_process_does(tiny_folder: Path, tmp_path: Path):
    """On more processes than an optimizer step of a run has micro-batches, which does not matter here."""
    printed = check_run("sample.py", *words_of(tmp_path, tiny_folder, "one"))
    assert "responses to 40 prompts" in printed
    launch(2, *words_of(tmp_path, tiny_folder, "two"), "trainer.devices=2", script="sample.py")
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.long
def test_ray_workers_share_the_prompts(tiny_folder: Path, tmp_path: Path):
    """The same command again computes nothing, and a failing command fails."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install -e '.[ray]'")
    check_run("sample.py", *words_of(tmp_path, tiny_folder, "one"))
    words = words_of(tmp_path, tiny_folder, "ray")
    command = [
        sys.executable,
        str(ROOT / "launch" / "ray_workers.py"),
        "--address",
        "local",
        "--workers",
        "2",
        "sample.py",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def start(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*command, *words, *more], capture_output=True, text=True, env=environment, timeout=300)

    done = start()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2" in done.stdout
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert start("generate.responses=0").returncode != 0
