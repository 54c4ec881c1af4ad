"""Runs that are killed anywhere, and go on by the same command to what the unbroken one leaves, to the last bit."""

import csv
import gc
import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow.parquet as pq
import pytest
from lightning.pytorch.callbacks import Callback

from tests.e2e.killing import Attempt, Driver
from tests.helpers.models import saved, tiny_model
from tests.helpers.runs import composed
from tests.helpers.runs import run_folder as only
from var.training.run import Run

pytestmark = pytest.mark.e2e

SELDOM = ("trainer.log_every_n_steps=2", "trainer.checkpoint_every_n_steps=3")
OBJECTIVES = {
    "sft": ["data.micro_batch=2", "data.global_batch=4", "trainer.epochs=1"],
    "var_grouped": ["data.micro_batch=2", "data.global_batch=4", "trainer.max_steps=5", "trainer.precision=64-true"],
    "dpo": ["data.micro_batch=1", "data.global_batch=2", "trainer.max_steps=5"],
    "bradley_terry": ["data.micro_batch=1", "data.global_batch=2", "trainer.max_steps=5"],
    "grpo": ["data.micro_batch=1", "data.global_batch=2", "trainer.max_steps=5"],
}
# A run dies at each of these in turn, at the event of that number which fits the pattern; started again it comes to
# the next. Checkpoints stand after every step. The last field: in the quick suite too.
PLACES = [
    ("the weights' hash is being noted", r"write .*/hashes/", 1, True),
    ("rows are being read", r"write .*/rows\.arrow", 1, False),
    ("the rows are there, the note that says so is not", r"write .*/rows/.*/done\.json", 1, True),
    ("tokens are being written", r"write .*/sequences\.arrow", 1, False),
    ("the tokens are there, the note that says so is not", r"write .*/sequences/.*/done\.json", 1, False),
    ("rewards are being stored", r"write .*/store/rewards/.*\.partial", 1, False),
    ("the plan is being written", r"write .*/plan\.npz", 1, False),
    ("the reference samples", r"run ", 2, False),
    ("its samples are about to stand", r"os\.rename .*/store/responses/.*\.parquet", 1, False),
    ("the curve is being started", r"write .*/metrics\.csv", 1, False),
    ("the first step is about to be taken", r"step ", 1, False),
    ("the first checkpoint is being written", r"write .*(/tmp/|step-1\.partial)", 1, False),
    ("the first checkpoint is about to stand", r"os\.rename .*step-1\.ckpt$", 1, False),
    ("accumulating towards the second step", r"step ", 2, False),
    ("accumulating, just resumed", r"step ", 1, True),
    ("the curve is being cut back to the checkpoint", r"write .*/metrics\.csv", 1, True),
    ("the link is about to be set", r"os\.symlink .*/checkpoints/", 1, False),
    ("the link is about to stand", r"os\.rename .*last\.ckpt$", 1, False),
    ("the checkpoint before is about to go", r"os\.remove .*step-\d+\.ckpt$", 1, False),
    ("the last checkpoint is about to stand", r"os\.rename .*step-5\.ckpt$", 1, False),
    ("the last but one is about to go", r"os\.remove .*step-4\.ckpt$", 1, True),
    ("the end is being evaluated", r"write .*/samples\.jsonl", 1, True),
    ("the export begins", r"os\.mkdir .*/model\.partial", 1, False),
    ("the export is about to stand", r"os\.rename .*/model$", 1, False),
    ("the export lacks its configuration", r"write .*/model/config\.yaml", 1, False),
    ("the figure is being drawn", r"write .*/curves\.png", 1, False),
    ("the summary is being written", r"write .*/summary\.json", 1, False),
    ("the summary is about to stand", r"os\.rename .*/summary\.json$", 1, True),
]


@dataclass(frozen=True)
class Place:
    """Where a run stands: its root holds runs, store and cache; the same command goes on there."""

    driver: Driver
    root: Path
    options: list[str]
    command: str = "train.py"

    def start(self, **stop: Any) -> Attempt:
        names = ("store", "cache", *(() if self.command == "eval.py" else ("runs",)))
        own = [f"{name}={self.root}/{name}" for name in names]
        return self.driver.start(self.command, [*self.options, *own], self.root, **stop)

    @property
    def folder(self) -> Path:
        return only(self.root / "runs")

    def finish(self) -> None:
        """The last attempt, which nobody disturbs."""
        done = self.start()
        assert done.code == 0, done.printed


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("logs"))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """12 prompts with two scored answers each, two of them held out; six epochs' worth of steps at most."""
    draw, path = random.Random(3), tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(12):
            texts = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) + str(k) for k in range(2)]
            responses = [{"text": text, "score": draw.gauss(0, 1)} for text in texts]
            file.write(json.dumps({"id": f"r{i}", "prompt": f"{i}?", "answer": "1", "responses": responses}) + "\n")
    return [
        f"model.path={tiny_folder}", "data=files", f"data.path={path}", "reward=exact_number",
        "reward._target_=killing.Distinct", "trainer.accelerator=cpu", "trainer.epochs=6",
        "trainer.log_every_n_steps=1", "trainer.checkpoint_every_n_steps=1", "data.validation_prompts=2",
        "eval.sampling.responses=2", "eval.sampling.max_new_tokens=3", "generate.responses=2",
        "generate.max_new_tokens=4", "optim.optimizer.lr=1e-2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(driver: Driver, base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The unbroken run of an objective with some overrides, once for all tests: where it stands, and its attempt."""
    known: dict[tuple[str, ...], tuple[Place, Attempt]] = {}

    def straight(objective: str, *more: str) -> tuple[Place, Attempt]:
        if (objective, *more) not in known:
            options = [*base, f"loss={objective}", *OBJECTIVES[objective], *more]
            place = Place(driver, tmp_path_factory.mktemp("straight") / objective, options)
            done = place.start()
            assert done.code == 0, done.printed
            known[objective, *more] = place, done
        return known[objective, *more]

    return straight


def outcome(folder: Path) -> dict[str, Any]:
    """What a run leaves, without what tells time and place."""
    summary = json.loads((folder / "summary.json").read_text())
    elsewhere = ("folder", "tokens_per_second", "computed", "seconds_of_stages", "seconds", "config", "commit", "dirty")
    with (folder / "metrics.csv").open(newline="") as file:
        curve = [{k: v for k, v in row.items() if not k.startswith("throughput/")} for row in csv.DictReader(file)]
    with np.load(folder / "plan.npz") as plan:
        arrays = {name: plan[name].tolist() for name in plan}
    return {
        "weights": (folder / "model" / "model.safetensors").read_bytes(),
        "curve": curve,
        "summary": {name: value for name, value in summary.items() if name not in elsewhere},
        "samples": samples.read_text() if (samples := folder / "samples.jsonl").exists() else None,
        "plan": arrays,
        "the figure is whole": (folder / "plots" / "curves.png").read_bytes()[-8:-4] == b"IEND",
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "checkpoints" not in p.parts),
    }


def same(killed: Place, straight: Place, told: str) -> None:
    one, two = outcome(killed.folder), outcome(straight.folder)
    for name in one:
        assert one[name] == two[name], f"{name} differs; {told}"


def check_progress(attempts: list[Attempt], every: int = 1) -> None:
    """An attempt that trains goes on at most `every` steps behind where the one before it came."""
    reached = 0
    for attempt in attempts:
        steps = sum(event.startswith("step ") for event in attempt.events)
        if steps:
            found = re.search(r"Going on from .*step-(\d+)", attempt.printed)
            begun = int(found[1]) if found else 0
            assert begun >= reached - every, f"{reached} steps were taken, and it began anew from {begun}"
            reached = begun + steps - (attempt.killed and attempt.place.startswith("step "))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_run_goes_on_wherever_it_is_killed(every: bool, straight: Any, tmp_path: Path) -> None:
    """At every place of a run's life in turn, once each; or at some of them."""
    unbroken, _ = straight("var_grouped")
    place, attempts = replace(unbroken, root=tmp_path / "killed"), list[Attempt]()
    for what, on, at, _ in (place for place in PLACES if every or place[-1]):
        attempts.append(place.start(on=on, at=at))
        assert attempts[-1].killed, f"{what}: it did not die there\n{told(attempts)}"
    place.finish()
    check_progress(attempts)
    same(place, unbroken, "killed at every place")


def chain(place: Place, events: list[str], seed: int, kills: int) -> list[Attempt]:
    """The same command again and again, killed so often at random, until nobody disturbs it.

    events: the unbroken run's. A file's many writes together are as likely as one other event.
    """
    draw, attempts = random.Random(seed), list[Attempt]()
    numbered = groupby(enumerate(events, 1), key=lambda event: event[1])
    places = [(what, [number for number, _ in several]) for what, several in numbered]
    for _ in range(kills):
        _, several = draw.choice(places)
        attempts.append(place.start(at=draw.choice(several)))
        if not attempts[-1].killed:
            assert attempts[-1].code == 0, told(attempts)
            break
    done = place.start()
    attempts.append(done)
    assert done.code == 0, told(attempts)
    return attempts


def told(attempts: list[Attempt]) -> str:
    """How it came to this."""
    return "\n".join(f"{a.code} at {len(a.events)}: {a.place}" for a in attempts) + f"\n{attempts[-1].printed}"


def test_an_online_run_killed_again_and_again(straight: Any, tmp_path: Path) -> None:
    """Its metrics are logged and its checkpoints written at different steps."""
    kill_again_and_again("grpo", 0, 2, straight, tmp_path, *SELDOM)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 9))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_killed_a_hundred_times(objective: str, seed: int, straight: Any, tmp_path: Path) -> None:
    """Some three hundred kills over the objectives and seeds; every other seed logs and checkpoints less often."""
    kill_again_and_again(objective, seed, 10, straight, tmp_path, *(SELDOM if seed % 2 else ()))


def kill_again_and_again(objective: str, seed: int, kills: int, straight: Any, tmp_path: Path, *more: str) -> None:
    unbroken, whole = straight(objective, *more)
    place = replace(unbroken, root=tmp_path / "killed")
    attempts = chain(place, whole.events, seed, kills)
    check_progress(attempts, every=3 if more else 1)
    same(place, unbroken, told(attempts))


@pytest.mark.long
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_killed_once_at_every_event(objective: str, straight: Any, tmp_path: Path) -> None:
    """The whole of a run's events, in strides of 7."""
    unbroken, whole = straight(objective)
    for at in range(1 + list(OBJECTIVES).index(objective), len(whole.events), 7):
        place = replace(unbroken, root=tmp_path / f"killed{at}")
        killed = place.start(at=at)
        place.finish()
        same(place, unbroken, told([killed]))


def texts(folder: Path) -> dict[str, str]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored(place: Place) -> dict[str, dict[bytes, Any]]:
    """What the store holds: of each shelf its items."""
    shelves: dict[str, dict[bytes, Any]] = {}
    for shard in sorted((place.root / "store").rglob("*.parquet")):
        items = pq.read_table(shard).to_pylist()
        shelf = shelves.setdefault(str(shard.parent.relative_to(place.root)), {})
        assert not shelf.keys() & {item["key"] for item in items}, "an item was computed twice"
        shelf |= {item["key"]: item["value"] for item in items}
    return shelves


def result(place: Place) -> dict[str, Any]:
    """What eval.py leaves, without what tells time and place."""
    files = texts(only(place.root / "evals"))
    result = json.loads(files.pop("result.json"))
    for name in ("config", "commit", "dirty"):
        del result["depends_on"][name]
    return {"result": result, **files}


COMMANDS = {
    "annotate.py": (["loss=dpo", "data.micro_batch=2", "data.global_batch=2"], stored),
    "sample.py": (["out={root}/out/rows.jsonl"], lambda place: texts(place.root / "out")),
    "eval.py": (["out={root}/evals", "reference={model}", "judge=reward", "seeds=[0,1]"], result),
}


@pytest.mark.parametrize("command", ["sample.py", "eval.py"])  # train.py fills the store as annotate.py does
def test_other_commands_go_on_too(command: str, driver: Driver, base: list[str], tmp_path: Path) -> None:
    kill_command(command, 0, 1, driver, base, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands_killed_again_and_again(
    command: str, seed: int, driver: Driver, base: list[str], tmp_path: Path
) -> None:
    kill_command(command, seed, 10, driver, base, tmp_path)


def kill_command(command: str, seed: int, kills: int, driver: Driver, base: list[str], tmp_path: Path) -> None:
    own, leaves = COMMANDS[command]
    known = ("model.", "data", "reward") + (() if command == "eval.py" else ("generate.",))
    common = [option for option in base if option.startswith(known)]
    places = [Place(driver, tmp_path / name, [], command) for name in ("straight", "killed")]
    for place in places:
        model = base[0].removeprefix("model.path=")
        own_options = [option.format(root=place.root, model=model) for option in own]
        place.options.extend([*common, *own_options])
    straight, killed = places
    whole = straight.start()
    assert whole.code == 0, whole.printed
    attempts = chain(killed, whole.events, seed, kills)
    assert leaves(killed) == leaves(straight), told(attempts)


# The disk is full from the first event on that fits the pattern; then there is room again. Second: as above.
FULL = [
    (r"write .*/hashes/", False),
    (r"write .*/rows\.arrow", False),
    (r"write .*/sequences/", False),
    (r"write .*/store/", False),
    (r"write .*/plan\.npz", False),
    (r"write .*/metrics\.csv", False),
    (r"write .*(/tmp/|step-3\.partial)", True),
    (r"write .*/samples\.jsonl", False),
    (r"write .*/model.*/README\.md", False),
    (r"write .*/curves\.png", False),
    (r"write .*/summary\.json", True),
]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_full_disk_loses_nothing_and_is_told(every: bool, straight: Any, tmp_path: Path) -> None:
    """Whatever does not fit, the run ends with what to do about it, and goes on once there is room."""
    unbroken, _ = straight("var_grouped")
    place = replace(unbroken, root=tmp_path / "full")
    attempts = []
    for on in (on for on, often in FULL if every or often):
        attempts.append(place.start(on=on, at=1, full=True))
        printed = attempts[-1].printed
        assert attempts[-1].code == 1, f"{on}\n{printed}"
        assert "Traceback" not in printed, f"{on}\n{printed}"
        assert re.search("no space left", printed, re.IGNORECASE), printed
        assert re.search("space|room", printed.lower().replace("no space left", "")), f"what to do: {printed}"
    place.finish()
    check_progress(attempts)
    same(place, unbroken, "after a full disk")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["var_grouped", "grpo"])
def test_a_disk_that_is_really_full(objective: str, straight: Any, small_disk: Path) -> None:
    """Less and less ballast on it, until a run fits: each attempt meets the end of the disk somewhere else."""
    unbroken, _ = straight(objective)
    place = replace(unbroken, root=small_disk / "run")
    attempts, ballast = [], small_disk / "ballast"
    for free in range(20, 4000, 60):
        ballast.unlink(missing_ok=True)
        room = os.statvfs(small_disk)
        ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - free * 1024)))
        attempts.append(place.start())
        if not attempts[-1].code:
            break
        assert "Traceback" not in attempts[-1].printed, attempts[-1].printed
        assert "space" in attempts[-1].printed, attempts[-1].printed
    assert len(attempts) > 5
    assert not attempts[-1].code, told(attempts)
    check_progress(attempts)
    same(place, unbroken, told(attempts))


class Resources(Callback):
    """Resident memory in MiB and open files of this process, after these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.seen = steps, dict[int, tuple[float, int]]()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self.seen[trainer.global_step] = memory, len(os.listdir("/proc/self/fd"))


@pytest.mark.long
@pytest.mark.parametrize(("objective", "steps"), [("sft", 10_000), ("grpo", 3_000)])
def test_a_long_run_stays_as_large_as_it_was(
    objective: str, steps: int, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither memory nor open files grow between the first fifth of the steps and the last, over hundreds of epochs
    and checkpoints."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # for the reward
    model = tiny_model(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1)  # fmt: skip
    saved(tmp_path / "tiny", model)
    options = [
        *base, f"loss={objective}", *OBJECTIVES[objective], f"model.path={tmp_path}/tiny", f"trainer.max_steps={steps}",
        "trainer.epochs=100000", "trainer.log_every_n_steps=20", "trainer.checkpoint_every_n_steps=100",
        "data.validation_prompts=0", *(f"{name}={tmp_path}/{name}" for name in ("runs", "store", "cache")),
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
