"""Devices that jobs on one machine share."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest

from var.utils import device_locks
from var.utils.device_locks import claim, name_devices

GPUS = ["0", "1", "2", "3"]

HOLD = """
import pathlib, sys, time
from var.utils.device_locks import claim
with claim(["0"], 1, pathlib.Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def polls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows by one each time that a job finds too few free devices."""
    polls = list[float]()
    monkeypatch.setattr(device_locks.time, "sleep", lambda seconds: polls.append(seconds))
    return polls


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 3, ["0", "1", "2"]),
        ("2,5", 2, ["2", "5"]),
        ("GPU-1a, MIG-2b", 2, ["GPU-1a", "MIG-2b"]),
        ("1,-1,2", 1, ["1"]),  # CUDA ignores what follows an invalid entry
        ("", 0, []),
        ("0,1", 0, []),  # the run does not use GPUs
    ],
)
def test_devices_are_named_as_cuda_names_them(visible: str | None, count: int, names: list[str]) -> None:
    assert name_devices(visible, count) == names


def test_job_waits_until_enough_devices_are_free(
    tmp_path: Path, polls: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that waits holds no devices, so a smaller one can start."""
    third = list[str]()

    def wait() -> None:
        with claim(GPUS, 2, tmp_path) as locks:
            third.extend(locks)

    with ExitStack() as first, claim(GPUS, 1, tmp_path) as second:
        assert list(second) == ["0"]
        assert list(first.enter_context(claim(GPUS, 2, tmp_path))) == ["1", "2"]
        waiting = Thread(target=wait)
        waiting.start()
        while len(polls) < 3:
            waiting.join(0.01)
            assert waiting.is_alive()
        with claim(GPUS, 1, tmp_path) as small:
            assert list(small) == ["3"]
            assert not third
        first.close()
        waiting.join()
    assert len(set(third)) == 2  # the first two, or one of them and the third, which came free before the other
    assert capsys.readouterr().out == "Waiting for 2 of the GPUs 0, 1, 2, 3\n"  # once


def test_killed_job_releases_its_devices(tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert job.stdout is not None
    job.stdout.readline()
    with claim(["0", "1"], 1, tmp_path) as locks:
        assert list(locks) == ["1"]
    job.kill()
    job.communicate()
    with claim(["0", "1"], 1, tmp_path) as locks:
        assert list(locks) == ["0"]


def test_devices_stay_claimed_while_a_process_of_the_job_lives(tmp_path: Path) -> None:
    with claim(["0", "1"], 1, tmp_path) as locks:
        files = [file.fileno() for file in locks.values()]
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=files)
    with claim(["0", "1"], 1, tmp_path) as locks:
        assert list(locks) == ["1"]
    child.communicate(b"\n")
    with claim(["0", "1"], 1, tmp_path) as locks:
        assert list(locks) == ["0"]
