"""Locks on files: who holds one is named, and a killed process holds none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from var.utils.errors import UserError
from var.utils.locks import claim_folder, find_holder, hold, remove_unused

HOLDER = "import sys, time; from pathlib import Path; from var.utils.locks import hold\n"
HOLDER += "with hold(Path(sys.argv[1]), 'holds', 0): print('held', flush=True); time.sleep(float(sys.argv[2]))"


def start_holder(path: Path, seconds: float) -> "subprocess.Popen[str]":
    """Start a process that holds a lock for some seconds; return when it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_waiting_process_says_for_which_one_and_gets_the_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "new" / "lock"
    process = start_holder(path, 2)
    with hold(path, "reads the same rows", 60):
        assert process.wait() == 0
    assert capsys.readouterr().out.count(f"Waiting for process {process.pid} on ") == 1
    assert find_holder(tmp_path / "new") is None


def test_the_holder_is_named_after_the_time(tmp_path: Path):
    process = start_holder(tmp_path / ".lock", 60)
    try:
        with (
            pytest.raises(
                UserError, match=rf"^process {process.pid} on '.*' trains in this folder, and holds .*\.lock"
            ),
            claim_folder(tmp_path, "trains in this folder"),
        ):
            pass
        assert str(find_holder(tmp_path)).startswith(f"process {process.pid} on ")
        remove_unused(tmp_path, [])
        assert (tmp_path / ".lock").exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    started = time.monotonic()
    with claim_folder(tmp_path, "trains"):  # the kernel has released it
        assert time.monotonic() - started < 5


def test_a_damaged_lock_file_is_only_a_name_less(tmp_path: Path):
    process = start_holder(tmp_path / ".lock", 60)
    (tmp_path / ".lock").write_text("[[[")
    try:
        with pytest.raises(UserError, match=r"^another process trains"), claim_folder(tmp_path, "trains"):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_folder_with_results_is_kept(tmp_path: Path):
    for name in ("run", "empty"):
        with claim_folder(tmp_path / name, "writes"):
            (tmp_path / name / "train.log").write_text("…")
    (tmp_path / "run" / "metrics.csv").touch()
    for name in ("run", "empty"):
        remove_unused(tmp_path / name, ["train.log"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path):
    """Else two processes would hold locks of one name: one of the removed file, and one of the new."""
    with claim_folder(tmp_path, "writes"):
        (tmp_path / ".lock").unlink()
        with claim_folder(tmp_path, "writes"), pytest.raises(UserError), claim_folder(tmp_path, "writes"):
            pass
