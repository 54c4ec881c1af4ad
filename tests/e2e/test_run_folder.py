"""A run's folder: one writer, none for a command that trains nothing, and what report.py says of it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import check_error, check_run, spawn
from tests.helpers.runs import ROOT
from var.report.read import find_records
from var.utils.locks import find_holder

pytestmark = pytest.mark.e2e


def wait_for(path: Path, pattern: str) -> Path:
    """Return the first file that matches, as soon as there is one."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if found := next(path.rglob(pattern), None):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{pattern} is not written")


def test_a_second_writer_is_an_error_and_a_killed_one_leaves_no_lock(options: list[str], tmp_path: Path):
    """While a run trains, the same command ends and names its process. report.py calls it running, then resumable."""
    words = [*options, "trainer.max_steps=100000", "trainer.epochs=100000", "trainer.checkpoint_every_n_steps=1"]
    process = spawn(str(ROOT / "train.py"), *words)
    folder = wait_for(tmp_path / "runs", "step-*.ckpt").parents[1]
    try:
        check_error(f"process {process.pid} on ", *words)
        assert f"{folder}: running, in process {process.pid} on " in find_records([folder]).problems[0]
        assert (folder / "metrics.csv").exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert "stopped after step " in find_records([folder]).problems[0]
    steps = int(max((folder / "checkpoints").glob("step-*.ckpt"), key=os.path.getmtime).stem.removeprefix("step-"))
    check_run("train.py", *words[:-3], f"trainer.max_steps={steps + 2}", *words[-2:], f"hydra.run.dir={folder}")


@pytest.mark.parametrize(
    "words", [["debug=dry"], ["debug=rows"], ["data.limit=0"], ["model.path=/nowhere"], ["data.micro_batch=7"],
     ["data.micro_batch=512", "data.global_batch=512", "data.last_micro_batch=drop"]]
)  # fmt: skip
def test_a_command_that_trains_nothing_leaves_no_folder(words: list[str], options: list[str], tmp_path: Path):
    if words[0].startswith("debug"):
        check_run("train.py", *options, *words)
    else:
        check_error("", *options, *words)
    assert not list((tmp_path / "runs").iterdir())


def test_a_failed_run_says_why_until_it_starts_again(options: list[str], tmp_path: Path):
    words = [*options, "trainer.max_steps=4", "trainer.checkpoint_every_n_steps=1", "optim.optimizer.lr=1e30"]
    check_error("is not finite in optimizer step", *words)
    folder = next((tmp_path / "runs").iterdir())
    (problem,) = find_records([folder]).problems
    assert "failed after step 1: " in problem
    assert "is not finite in optimizer step" in problem
    (folder / "error.txt").write_text("\x1b[31m" + "x" * 10_000)
    assert "\x1b" not in find_records([folder]).problems[0]
    assert len(find_records([folder]).problems[0]) < 600
    check_run("train.py", *words, "trainer.nonfinite=skip", f"hydra.run.dir={folder}")
    assert not (folder / "error.txt").exists()


def test_a_finished_run_is_kept_by_a_dry_one(options: list[str], tmp_path: Path):
    check_run("train.py", *options, "trainer.max_steps=2")
    before = sorted(path.name for path in next((tmp_path / "runs").iterdir()).iterdir())
    check_run("train.py", *options, "trainer.max_steps=2", "debug=dry")
    assert sorted(path.name for path in next((tmp_path / "runs").iterdir()).iterdir()) == before


def test_invalid_tokens_are_found_before_a_model_is_loaded(
    options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """All rows are tokenized first."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("var.models.pretrained.Pretrained.load", load)
    check_error("data.max_length=8", *options, "data.max_length=8", "data.overlong=error")


@pytest.mark.long
def test_workers_of_a_killed_sweep_end_and_release_their_folders(options: list[str], tmp_path: Path):
    """Then the same command resumes them. Before, they trained on, next to the workers of the second sweep."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [*options, "trainer.max_steps=100000", "trainer.epochs=100000", "trainer.checkpoint_every_n_steps=1"]
    sweep = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"]
    process = spawn(str(ROOT / "train.py"), *sweep, *words)
    until = time.monotonic() + 200
    while len(folders := {path.parents[1] for path in (tmp_path / "runs").rglob("step-*.ckpt")}) < 2:
        assert time.monotonic() < until
        time.sleep(0.5)
    assert all(find_holder(folder) for folder in folders)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 60
    while any(find_holder(folder) for folder in folders):
        assert time.monotonic() < until
        time.sleep(0.5)
