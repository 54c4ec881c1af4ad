"""Runs that are killed anywhere resume with the same command, and equal an uninterrupted run to the last bit."""

import gc
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.callbacks import Callback

from tests.helpers.cache import read_shard
from tests.helpers.cli import read_summary, spawn, write_to
from tests.helpers.killed_runs import LOSSES, Job, check_outcome, describe, kill_randomly, list_options
from tests.helpers.killing import Attempt, Driver
from tests.helpers.models import saved, tiny_model
from tests.helpers.runs import ROOT, composed, run_folder
from tests.kills import Counts, kill_runs
from var.training.run import Run

pytestmark = pytest.mark.e2e

# Where a run is killed. Each attempt dies at the n-th event that matches the pattern, and the next attempt comes to the
# next place. Checkpoints are written after every step. The last field: whether the fast suite has this place, too.
PLACES = [
    ("while rows are written", r"write .*/rows\.arrow", 1, False),
    ("after the rows, before the file that marks them as complete", r"write .*/rows/.*/done\.json", 1, True),
    ("while tokens are written", r"write .*/sequences\.arrow", 1, False),
    ("after the tokens, before the file that marks them as complete", r"write .*/sequences/.*/done\.json", 1, False),
    ("while the weights' hash is written", r"write .*/hashes/", 1, True),
    ("while rewards are cached", r"write .*/store/rewards/.*\.partial", 1, False),
    ("while the plan is written", r"write .*/plan\.npz", 1, False),
    ("while the reference samples", r"run ", 2, False),
    ("before its samples are renamed", r"os\.rename .*/store/responses/.*\.arrow", 1, False),
    ("at the start of metrics.csv", r"write .*/metrics\.csv", 1, False),
    ("before the first step", r"step ", 1, False),
    ("while the first checkpoint is written", r"write .*(/tmp/|step-1\.ckpt\..*partial)", 1, False),
    ("before the first checkpoint is renamed", r"os\.rename .*step-1\.ckpt$", 1, False),
    ("while accumulating for the second step", r"step ", 2, False),
    ("while accumulating, just resumed", r"step ", 1, True),
    ("while metrics.csv is cut to the checkpoint", r"write .*/metrics\.csv", 1, True),
    ("before last.ckpt is linked", r"os\.symlink .*/checkpoints/", 1, False),
    ("before last.ckpt is renamed", r"os\.rename .*last\.ckpt$", 1, False),
    ("before the previous checkpoint is removed", r"os\.remove .*step-\d+\.ckpt$", 1, False),
    ("before the last checkpoint is renamed", r"os\.rename .*step-5\.ckpt$", 1, False),
    ("before the last but two is removed", r"os\.remove .*step-3\.ckpt$", 1, True),
    ("before the export", r"os\.mkdir .*/model\..*\.partial", 1, False),
    ("before the export is renamed", r"os\.rename .*/model$", 1, False),
    ("before the export has its configuration", r"write .*/model/config\.yaml", 1, False),
    ("while the trained policy is evaluated", r"write .*/samples\.jsonl", 1, True),
    ("while the figure is drawn", r"write .*/curves\.png", 1, False),
    ("while the summary is written", r"write .*/summary\.json", 1, False),
    ("before the summary is renamed", r"os\.rename .*/summary\.json$", 1, True),
]
# The disk is full from the first event that matches, and has space again in the next attempt.
FULL = [
    (r"write .*/hashes/", False),
    (r"write .*/rows\.arrow", False),
    (r"write .*/sequences/", False),
    (r"write .*/store/", False),
    (r"write .*/plan\.npz", False),
    (r"write .*/metrics\.csv", False),
    (r"write .*(/tmp/|step-3\.ckpt\..*partial)", True),
    (r"write .*/samples\.jsonl", False),
    (r"write .*/model.*/README\.md", False),
    (r"write .*/curves\.png", False),
    (r"write .*/summary\.json", True),
]
every_place = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
each_loss = pytest.mark.parametrize("loss", LOSSES)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("logs"))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides of a run without its loss."""
    return list_options(tiny_folder, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(driver: Driver, base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that runs a loss without interruption, once for all tests."""
    finished: dict[tuple[str, ...], tuple[Job, Attempt]] = {}

    def straight(loss: str, *more: str) -> tuple[Job, Attempt]:
        if (loss, *more) not in finished:
            options = [*base, f"loss={loss}", *LOSSES[loss], *more]
            job = Job(driver, tmp_path_factory.mktemp("straight") / loss, options)
            finished[loss, *more] = job, job.finish()
        return finished[loss, *more]

    return straight


@every_place
@pytest.mark.long
def test_run_resumes_wherever_it_is_killed(every: bool, straight: Any, tmp_path: Path) -> None:
    """One run is killed at every place in turn, or at some of them."""
    unbroken, _ = straight("var_grouped")
    job, attempts = replace(unbroken, root=tmp_path / "killed"), list[Attempt]()
    for what, on, at, _ in (place for place in PLACES if every or place[-1]):
        attempts.append(job.start(on=on, at=at))
        assert attempts[-1].killed, f"not killed {what}\n{describe(attempts)}"
    attempts.append(job.finish())
    check_outcome(job, unbroken, attempts)


# Where a signal ends a run in turn. The last field: whether the fast suite has this place, too.
LEAVE = [
    ("while rewards are cached", r"write .*/store/rewards/.*\.partial", 1, signal.SIGUSR1, True),
    ("while the reference samples", r"run ", 2, signal.SIGTERM, True),
    ("while the model is loaded", r"write .*/metrics\.csv", 1, signal.SIGTERM, False),
    ("while the trained policy is evaluated", r"write .*/samples\.jsonl", 1, signal.SIGUSR1, True),
    ("while the model is exported", r"write .*/model.*/README\.md", 1, signal.SIGTERM, True),
    ("while the figure is drawn", r"write .*/curves\.png", 1, signal.SIGUSR1, False),
]


@every_place
@pytest.mark.long
def test_signal_ends_a_run_in_every_stage(every: bool, straight: Any, tmp_path: Path) -> None:
    """The status is 128 plus the signal, the next event does not happen, and the same command resumes."""
    unbroken, _ = straight("var_grouped")
    job, attempts = replace(unbroken, root=tmp_path / "signaled"), list[Attempt]()
    for what, on, at, number, _ in (place for place in LEAVE if every or place[-1]):
        attempts.append(job.start(on=on, at=at, number=number))
        assert attempts[-1].code == 128 + number, f"{what}\n{describe(attempts)}"
        assert f"Received {number.name}" in attempts[-1].printed, attempts[-1].printed
        assert "Traceback" not in attempts[-1].printed, attempts[-1].printed
        matches = [i for i, event in enumerate(attempts[-1].events) if re.search(on, event)]
        assert len(attempts[-1].events) - matches[at - 1] < 20, f"it went on {what}\n{describe(attempts)}"
    attempts.append(job.finish())
    check_outcome(job, unbroken, attempts)
    earlier = [read_summary(run.folder)["seconds_of_earlier_attempts"] for run in (unbroken, job)]
    assert earlier[0] == 0 < earlier[1]
    assert "annotation and training before it was resumed" in attempts[-1].printed


@pytest.mark.long
def test_killed_runs_sweeps_and_ranks_end_as_uninterrupted_ones(tmp_path: Path) -> None:
    """Run `python -m tests.kills` with fewer kills."""
    counts = Counts()
    kill_runs(30, seed=1, folder=tmp_path, counts=counts)
    assert counts.total() == 30


def find_child(process: int, word: str) -> int | None:
    """Return the child of a process whose command line contains a word, if there is one."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return next((int(child) for child in children if word in Path(f"/proc/{child}/cmdline").read_text()), None)


@pytest.mark.long
def test_second_rank_ends_if_the_first_is_killed_while_it_starts(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, it tried to connect to the first one for a day."""
    (tmp_path / "sitecustomize.py").write_text("import var.utils.signals\nvar.utils.signals.GRACE = 1.0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    two = ["trainer.devices=2", "strategy=ddp", *write_to(tmp_path)]
    process = spawn(str(ROOT / "train.py"), *base, "loss=grpo", *LOSSES["grpo"], *two)
    while (second := find_child(process.pid, "ddp_process_1")) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    try:
        process.communicate(timeout=60)  # until the second rank has closed its output
    except subprocess.TimeoutExpired:
        os.kill(second, signal.SIGKILL)
        raise


@pytest.mark.long
@each_loss
def test_run_is_killed_at_every_seventh_event(loss: str, straight: Any, tmp_path: Path) -> None:
    unbroken, complete = straight(loss)
    for at in range(1 + list(LOSSES).index(loss), len(complete.events), 7):
        job = replace(unbroken, root=tmp_path / f"killed{at}")
        check_outcome(job, unbroken, [job.start(at=at), job.finish()])


def read_texts(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_cache(job: Job) -> dict[str, dict[bytes, Any]]:
    """Return the items of each table of the annotation cache. Assert that no item has two values."""
    tables: dict[str, dict[bytes, Any]] = {}
    for shard in sorted((job.root / "store").rglob("*.arrow")):
        items = read_shard(shard).to_pylist()
        table = tables.setdefault(str(shard.parent.relative_to(job.root)), {})
        assert all(table.get(item["key"], item["value"]) == item["value"] for item in items)
        table |= {item["key"]: item["value"] for item in items}
    return tables


def read_evaluation(job: Job) -> dict[str, Any]:
    """Return what eval.py writes, without times and paths."""
    files = read_texts(run_folder(job.root / "evals"))
    result = json.loads(files.pop("result.json"))
    for name in ("config", "commit", "dirty"):
        del result["depends_on"][name]
    return {"result": result, **files}


COMMANDS = {
    "annotate.py": (["loss=dpo", "data.micro_batch=2", "data.global_batch=2"], read_cache),
    "sample.py": (["out={root}/out/rows.jsonl"], lambda job: read_texts(job.root / "out")),
    "eval.py": (["out={root}/evals", "reference={model}", "judge=reward", "seeds=[0,1]"], read_evaluation),
}


@pytest.mark.parametrize(
    ("command", "seed", "kills"),
    [
        ("sample.py", 0, 1),
        ("eval.py", 0, 1),  # annotate.py is left out: train.py fills the cache in the same way
        *(pytest.param(command, seed, 10, marks=pytest.mark.long) for command in COMMANDS for seed in (1, 2, 3)),
    ],
)
@pytest.mark.long
def test_other_commands_resume(
    command: str, seed: int, kills: int, driver: Driver, base: list[str], tmp_path: Path
) -> None:
    own, read = COMMANDS[command]
    settings = ("model.", "data", "reward") + (() if command == "eval.py" else ("generate.",))
    common = [option for option in base if option.startswith(settings)]
    model = base[0].removeprefix("model.path=")
    straight, killed = (
        Job(driver, root, [*common, *(option.format(root=root, model=model) for option in own)], command)
        for root in (tmp_path / "straight", tmp_path / "killed")
    )
    attempts = kill_randomly(killed, straight.finish(), random.Random(seed), kills)
    assert read(killed) == read(straight), describe(attempts)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_annotations_are_kept_on_a_signal(number: int, driver: Driver, base: list[str], tmp_path: Path) -> None:
    """All shards before the signal are read by the same command, which computes the others."""
    own, read = COMMANDS["annotate.py"]
    common = [option for option in base if not option.startswith("eval.")]
    straight, stopped = (Job(driver, tmp_path / name, [*common, *own], "annotate.py") for name in ("one", "two"))
    straight.finish()
    first = stopped.start(on="run ", at=3, number=number)  # while it samples for validation, after the pairs
    assert first.code == 128 + number, first.printed
    kept = read(stopped)
    assert {path.split("/")[1] for path in kept} == {"rewards", "reference_logps"}, describe([first])
    again = stopped.finish()
    assert "Scoring" not in again.printed
    assert read(stopped) == read(straight)  # and no item was computed twice


@every_place
@pytest.mark.long
def test_run_resumes_after_a_full_disk(every: bool, straight: Any, tmp_path: Path) -> None:
    """Whatever does not fit, the run ends with an error that says what to do, and resumes once there is space."""
    unbroken, _ = straight("var_grouped")
    job, attempts = replace(unbroken, root=tmp_path / "full"), list[Attempt]()
    for on in (on for on, fast in FULL if every or fast):
        attempts.append(job.start(on=on, at=1, full=True))
        printed = attempts[-1].printed
        assert attempts[-1].code == 1, f"{on}\n{printed}"
        assert "Traceback" not in printed, f"{on}\n{printed}"
        assert re.search("no space left", printed, re.IGNORECASE), printed
        assert re.search("space|room", printed.lower().replace("no space left", "")), f"what to do: {printed}"
    attempts.append(job.finish())
    check_outcome(job, unbroken, attempts)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB, if this process may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.long
@pytest.mark.parametrize("loss", ["var_grouped", "grpo"])
def test_run_resumes_on_a_small_disk(loss: str, straight: Any, small_disk: Path) -> None:
    """A file that fills the disk shrinks until a run fits, so each attempt runs out of space somewhere else."""
    unbroken, _ = straight(loss)
    job = replace(unbroken, root=small_disk / "run")
    attempts, ballast = [], small_disk / "ballast"
    for free in range(20, 4000, 60):
        ballast.unlink(missing_ok=True)
        disk = os.statvfs(small_disk)
        ballast.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - free * 1024)))
        attempts.append(job.start())
        if not attempts[-1].code:
            break
        assert "Traceback" not in attempts[-1].printed, attempts[-1].printed
        assert "space" in attempts[-1].printed, attempts[-1].printed
    assert len(attempts) > 5
    assert not attempts[-1].code, describe(attempts)
    check_outcome(job, unbroken, attempts)


class Resources(Callback):
    """Records resident memory in MiB and open files of this process after given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.seen = steps, dict[int, tuple[float, int]]()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self.seen[trainer.global_step] = memory, len(os.listdir("/proc/self/fd"))


@pytest.mark.long
@pytest.mark.parametrize(("loss", "steps"), [("sft", 10_000), ("grpo", 3_000)])
def test_long_run_leaks_no_memory_or_files(loss: str, steps: int, base: list[str], tmp_path: Path) -> None:
    """Neither grows after the first fifth of the steps, over hundreds of epochs and checkpoints."""
    model = tiny_model(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1)  # fmt: skip
    saved(tmp_path / "tiny", model)
    options = [
        *base, f"loss={loss}", *LOSSES[loss], f"model.path={tmp_path}/tiny", f"trainer.max_steps={steps}",
        "trainer.epochs=100000", "trainer.log_every_n_steps=20", "trainer.checkpoint_every_n_steps=100",
        "data.validation_prompts=0", *write_to(tmp_path),
    ]  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run.compose(composed(*options), folder)
    resources = Resources(steps // 5, steps)
    trainer, module = run.trainer(), run.module()
    trainer.callbacks.append(resources)  # type: ignore[attr-defined]
    trainer.fit(module, run.data)
    (memory, files), (memory_later, files_later) = resources.seen.values()
    assert memory_later < memory + 8, f"{memory:.1f} MiB, later {memory_later:.1f}"
    assert files_later <= files
