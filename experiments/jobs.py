"""Run the commands of tables: each once, in a folder that is named after it, after the commands that it needs."""

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import Queue
from threading import Lock

from experiments.items.base import Command, Row, Table
from var.utils.device_locks import name_devices
from var.utils.files import atomic, remove
from var.utils.signals import end_with_parent

ROOT = Path(__file__).parents[1]
TAIL = 3  # lines of a failed command's output in the table
DONE = "done.json"
PLACES = ("runs", "annotation_cache", "cache", "out")  # keys of folders


@dataclass(frozen=True)
class Job:
    """A command with its seed, its own folder, and the jobs that it needs."""

    command: Command
    seed: int
    base: Path
    """The folder of all jobs."""
    needs: Mapping[str, "Job"] = field(default_factory=dict)
    """The jobs whose run's folder is a placeholder, by its name."""
    timed: bool = False
    stored: bool = False
    """Whether only its results are kept, and not its model."""

    @cached_property
    def folder(self) -> Path:
        """Its own folder. A changed command has another one, so that no result of an earlier one is taken for it."""
        named = self._fill({name: job.folder.name for name, job in self.needs.items()} | {"own": "."})
        text = json.dumps([self.command.program, named, self.timed])
        return self.base / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def name(self) -> str:
        """What the command is: its loss or its program."""
        losses = [word.removeprefix("loss=") for word in self.command.words if word.startswith("loss=")]
        program = self.command.program[-1].removesuffix(".py").replace("/", ".").split(".")[-1]
        return f"{program}-{losses[-1]}" if losses else program

    @property
    def result(self) -> Path | None:
        """The file with its result, or None if it is not finished."""
        if not (self.folder / DONE).exists():
            return None
        return next(iter(sorted(self.folder.glob(self.command.result))), None)

    def in_order(self) -> Iterator["Job"]:
        """Yield the jobs that it needs, in the order in which they run, and itself; one may come several times."""
        for needed in self.needs.values():
            yield from needed.in_order()
        yield self

    @property
    def seconds(self) -> float:
        """How long it ran, with its interruptions."""
        return float(json.loads((self.folder / DONE).read_text())["seconds"])

    def _fill(self, places: Mapping[str, str]) -> list[str]:
        known = {"seed": str(self.seed), **places}
        words = [word for word in self.command.words if "{run}" not in word or "run" in known]
        return [re.sub(r"\{([^{}]+)\}", lambda found: known.get(found[1], found[0]), word) for word in words]

    @property
    def words(self) -> list[str]:
        """The command. Runs that are not finished yet are named in angle brackets."""
        runs = {name: (str(job.result.parent) if job.result else f"<{name}>") for name, job in self.needs.items()}
        caches = [f"annotation_cache={self.folder}/annotations"] if self.timed else []
        return [*self.command.program, *self._fill({**runs, "own": str(self.folder)}), *caches]

    @property
    def portable(self) -> list[str]:
        """The command without places on this machine; runs are named after their configuration."""
        runs = {name: (job.result.parent.name if job.result else f"<{name}>") for name, job in self.needs.items()}
        words = self._fill({**runs, "own": f"<{self.name}>"})
        words = [word for word in words if word.partition("=")[0] not in PLACES]
        return ["python", *self.command.program, *(re.sub("=/.*", "=<path>", word) for word in words)]


def list_jobs(
    table: Table, row: Row, seed: int, base: Path, overrides: Mapping[tuple[str, Command], Sequence[str]]
) -> dict[str, Job]:
    """Return the jobs of a row by the names of its stages.

    overrides: words for each command, by its stage's name and itself.
    """
    rows = {other.label: other for other in table.rows if not other.group or other.group == row.group}
    jobs: dict[str, Job] = {}
    for name, command in row.stages.items():
        needs = dict[str, Job]()
        for label in dict.fromkeys(re.findall(r"\{([^{}]+)\}", " ".join(command.words))):
            if label == "run" and "train" in jobs:
                needs[label] = jobs["train"]
            elif label in rows and label != row.label:
                needs[label] = list_jobs(table, rows[label], seed, base, overrides)["train"]
        more = overrides.get((name, command), ())
        words = (
            *(word for word in command.words if word.partition("=")[0] not in {m.partition("=")[0] for m in more}),
            *more,
        )
        own = table.seeds[0] if row.once else seed
        full = Command(command.program, words, command.result)
        jobs[name] = Job(full, own, base, needs, name == table.timed, table.stored)
    return jobs


class Runner:
    """Runs jobs, several at once if `count` says so, and each once."""

    def __init__(self, count: int = 1, launcher: str = ""):
        """count: commands at once. launcher: of Hydra, which runs commands elsewhere, as on SLURM; "": here."""
        self.launcher, self._stopped = launcher, False
        self._reasons: dict[Path, str] = {}
        self._locks: dict[Path, Lock] = defaultdict(Lock)
        self._lock = Lock()
        self._shares = Queue[dict[str, str]]()
        for share in share_devices(count):
            self._shares.put(share)

    def run(self, job: Job) -> str:
        """Run a job, after those that it needs, unless it is finished.

        Any number of threads may call this. Threads that wait for another job do not use a share of the devices.
        """
        for name, needed in job.needs.items():
            if reason := self.run(needed):
                return reason if name == "run" else f"{name} failed: {reason}"
        with self._lock:
            lock = self._locks[job.folder]
        with lock:  # jobs share the jobs that they need
            if job.result is None and job.folder not in self._reasons:
                share = self._shares.get()
                if self._stopped:
                    self._shares.put(share)
                    return "the driver stopped before it started"
                print(f"{job.name}, seed {job.seed}: started ({job.folder})", flush=True)
                try:
                    self._reasons[job.folder] = self._start(job, share)
                finally:
                    self._shares.put(share)
                print(f"{job.name}, seed {job.seed}: {self._reasons[job.folder] or 'finished'}", flush=True)
            return self._reasons.get(job.folder, "")

    def stop(self) -> None:
        """Start no further command."""
        self._stopped = True

    def _launch(self, job: Job) -> list[str]:
        """Return the words that make Hydra's launcher run a command. Those of the job may replace them."""
        program = job.command.program[0]
        if not self.launcher or program not in LAUNCHED:
            return []
        words = ["-m", f"hydra/launcher={self.launcher}"]
        if program != "train.py":  # whose sweeps are in `runs`
            words += [f"hydra.sweep.dir={job.folder}/multirun"]
        if program == "eval.py":
            # it starts a process per GPU of its machine; conf/hydra/launcher/slurm.yaml reads keys of train.py
            own = ("nodes", "tasks_per_node", "gpus_per_node") if self.launcher == "slurm" else ()
            words += [f"hydra.launcher.{key}=1" for key in own]
        return words

    def _start(self, job: Job, environment: Mapping[str, str]) -> str:
        job.folder.mkdir(parents=True, exist_ok=True)
        log, times = job.folder / "output.log", job.folder / "seconds.txt"
        words = [*job.command.program, *self._launch(job), *job.words[len(job.command.program) :]]
        with (job.folder / "lock").open("w") as lock:  # its processes inherit it, and may live longer than a driver
            fcntl.flock(lock, fcntl.LOCK_EX)
            if job.result is not None:  # of another driver
                return ""
            if job.timed:  # a resumed run would lack the seconds and the annotations of its first part
                for path in set(job.folder.iterdir()) - {job.folder / "lock"}:
                    remove(path)
            started = time.monotonic()
            with log.open("w") as output:
                done = subprocess.run(
                    [sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                    env={**os.environ, **environment}, pass_fds=(lock.fileno(),),
                    preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # it saves, and the next start resumes it
                ).returncode  # fmt: skip
            with times.open("a") as file:
                file.write(f"{time.monotonic() - started:.1f}\n")
        if done == 0 and any(job.folder.glob(job.command.result)):
            spent = sum(map(float, times.read_text().split()))
            with atomic(job.folder / DONE) as file:
                json.dump({"seconds": round(spent, 1), "command": words}, file)
            if job.stored and job.result is not None:
                remove(job.result.parent / "model")
            return ""
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"status {done}: {' '.join(lines[-TAIL:])[-300:]}"


LAUNCHED = ("train.py", "eval.py", "sample.py")


def share_devices(count: int) -> list[dict[str, str]]:
    """Return the environment of each of `count` jobs at once: its part of the GPUs, or else of the CPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = name_devices(visible, len(visible.split(",")) if visible else count_gpus())
    if len(names) >= count > 1:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(names[i::count])} for i in range(count)]
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    return [{"OMP_NUM_THREADS": str(threads)} if count > 1 else {} for _ in range(count)]


def count_gpus() -> int:
    """Return the number of GPUs. torch is not imported, because it would keep memory on each."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())
