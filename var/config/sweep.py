"""Run the jobs of a sweep: each with its processes and GPUs, and all of them even if some fail."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, ClassVar

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from var.config.check import PACKAGED
from var.config.run_files import read_summary
from var.config.schema import TrainerSettings
from var.utils.device_locks import claim, name_devices
from var.utils.errors import UserError
from var.utils.locks import ERROR, find_holder, remove_unused
from var.utils.signals import end_with_parent, follow_parent

LAUNCHERS = {"JoblibLauncher": "joblib", "LocalLauncher": "submitit_local"}
"""Launchers that run several jobs at a time on one machine, and leave its GPUs to the jobs."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that a job's process receives from the sweep."""

ROOT = Path(__file__).parents[2]
"""The folder with the package."""

RANK_VARIABLES = {
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
RANK_PREFIXES = ("SUBMITIT_", "SLURM_", "TORCHELASTIC_")
"""With these, Lightning would expect that a launcher has started the other ranks."""


follow_parent_once = functools.cache(follow_parent)  # a worker runs several jobs


class JobFailed(UserError):
    """The process of a job failed. It has printed its error."""


@dataclass
class Sweep(Callback):
    """Record failed jobs, so that the other jobs run and all failures are listed at the end.

    Hydra creates it in the process of the sweep, and launchers send it to the processes of the jobs.
    """

    current: ClassVar["Sweep | None"] = None
    """The sweep of this process."""

    record: str | None = None
    """The file for the error of this run, if it is a job in a process of its own."""
    parallel: bool = False
    """Whether other jobs may run at the same time as this one in a process of its own."""
    failures: Path | None = field(default=None, init=False)
    """The folder of the errors. Workers on other machines can write to it."""
    locks: Path | None = field(default=None, init=False)
    """The folder of the locks of devices, on this machine: network file systems may lack locks."""
    visible: str | None = field(default=None, init=False)
    """CUDA_VISIBLE_DEVICES, which submitit_local sets to the same GPUs, or none, for all jobs."""
    pid: int | None = field(default=None, init=False)
    """The process of the sweep."""
    swept: set[str] = field(default_factory=set, init=False)
    """The keys that differ between the jobs."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Name the folders. They are created when they are needed."""
        name = uuid.uuid4().hex[:8]
        self.pid = os.getpid()
        self.failures = Path(config.hydra.sweep.dir).absolute() / f".failures-{name}"
        self.locks = Path(tempfile.gettempdir()) / f"var-devices-{name}"
        self.visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = OverridesParser.create().parse_overrides(config.hydra.overrides.task)
        self.swept = {word.key_or_group for word in words if word.is_sweep_override()}
        self.swept |= set(config.hydra.sweeper.get("params") or ())
        Sweep.current = self

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Set the sweep of a job's process. A process that the sweep started ends with it."""
        Sweep.current = self
        if self.record and "LOCAL_RANK" not in os.environ:
            end_with_parent(signal.SIGTERM)
        elif self.pid not in (None, os.getpid()):  # a worker of joblib or submitit
            follow_parent_once()
        self._label(config)

    def _label(self, config: DictConfig) -> None:
        """Begin the lines of a job with its number, if others may run at the same time."""
        from var.utils.console import label_lines, say

        if self.parallel or self.pid not in (None, os.getpid()):
            label_lines(f"#{config.hydra.job.num}")
            say(" ".join(config.hydra.overrides.task))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Remove the folder of a job that wrote nothing. Record the error of a failed job, and print it."""
        from var.config.entry import describe

        folder, error = Path(config.hydra.runtime.output_dir).resolve(), job_return._return_value
        failed = job_return.status == JobStatus.FAILED
        message = describe(error) if failed else None
        text = message or f"{type(error).__name__}: {error}"
        if os.environ.get("LOCAL_RANK", "0") == "0" and not Path.cwd().is_relative_to(folder):
            remove_unused(folder, [f"{config.hydra.job.name}.log", *([".hydra"] if failed else [])])
            if failed and folder.is_dir() and not (folder / "summary.json").exists() and not find_holder(folder):
                with suppress(OSError):  # such as a full disk
                    (folder / ERROR).write_text(f"{text}\n")
        if not (self.record or self.failures) or (self.record and not failed):
            return
        job, words = config.hydra.job.num, config.hydra.overrides.task
        own = " ".join(word for word in words if word.partition("=")[0].lstrip("+") in self.swept)
        if not failed:
            _write_once(self.path(job, "done"), json.dumps({"job": f"#{job} {own}", "folder": str(folder)}))
            return
        if self.record:  # the command prints it
            _write_once(Path(self.record), text)
            return
        if message is None:
            sys.excepthook(type(error), error, error.__traceback__)
        elif not isinstance(error, JobFailed):
            print(f"Job {job} failed: {message}", file=sys.stderr, flush=True)
        lines = [f"#{job} {own}", " ".join(text.split())[:300], *([str(folder)] if folder.exists() else [])]
        _write_once(self.path(job, "job"), "\n    ".join(lines))
        if config.hydra.sweeper._target_.endswith("BasicSweeper"):  # it would stop before its next batch
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def path(self, job: int, kind: str) -> Path:
        """Return the file of a job's error or end: `kind` is "job" or "done", or "process" for its own process."""
        assert self.failures is not None
        return self.failures / f"{job:06}.{kind}"


def end_sweep() -> list[str]:
    """Print the results of this process's sweep, which is over, and return a text per failed job."""
    sweep, Sweep.current = Sweep.current, None
    if sweep is None or sweep.failures is None or sweep.locks is None:
        return []
    texts = [path.read_text() for path in sorted(sweep.failures.glob("*.job"))]
    show_results([json.loads(path.read_text()) for path in sorted(sweep.failures.glob("*.done"))])
    for folder in (sweep.failures, sweep.locks):
        shutil.rmtree(folder, ignore_errors=True)
    return texts


def show_results(jobs: Sequence[Mapping[str, str]]) -> None:
    """Print a row for each job that trained a model. jobs: its number with its own overrides, and its folder."""
    from rich.table import Table

    from var.utils.console import console
    from var.utils.statistics import Estimate

    table = Table("job", title="Sweep", title_justify="left")
    for title in ("reward", "gain", "KL, nats", "steps"):
        table.add_column(title, justify="right", no_wrap=True)
    for job in jobs:
        with suppress(UserError, LookupError, TypeError, ValueError):  # not of train.py, or damaged since
            summary = read_summary(Path(job["folder"]))
            scores = summary["validation"].get("reward") or summary["validation"].get("accuracy") or {}
            numbers = (scores.get("after"), scores.get("gain"), summary["kl"])
            table.add_row(job["job"], *(str(Estimate.from_json(one)) for one in numbers), str(summary["steps"]))
    if len(table.rows) > 1:
        console.print(table)


def is_multirun() -> bool:
    """Return whether this run is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def needs_process(cfg: DictConfig) -> bool:
    """Return whether this run is a job of a sweep that cannot run in the sweep's process.

    Lightning would start the other ranks of a job with the complete sweep's command line (hydra #2070, Lightning
    #11300), and a process that has initialized CUDA keeps its GPUs.
    """
    if not is_multirun() or cfg.dry:
        return False
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and "SUBMITIT_EXECUTOR" in os.environ:
        return False  # each of submitit's tasks is a rank
    devices, settings = list_devices(cfg), TrainerSettings(**cfg.trainer)
    if started > 1:
        raise UserError(
            f"-m on {started} processes: each process would run the complete sweep. Start one process without torchrun "
            "or srun; each job starts its own processes."
        )
    if settings.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={settings.num_nodes}: this launcher runs a job on one machine. Set "
            f"hydra/launcher=submitit_slurm hydra.launcher.nodes={settings.num_nodes} "
            f"hydra.launcher.tasks_per_node={settings.local}."
        )
    if len(devices) > 1 and settings.devices == "auto" and "SUBMITIT_EXECUTOR" not in os.environ:
        raise UserError(
            f"trainer.devices=auto: with hydra/launcher={_find_launcher()}, jobs share the {len(devices)} GPUs of this "
            "machine. Set the number per job, for example trainer.devices=1."
        )
    if devices and settings.local > len(devices):
        raise UserError(f"trainer.devices={settings.local}: only {len(devices)} GPUs are visible: {', '.join(devices)}")
    return settings.world > 1 or bool(devices)


def list_devices(cfg: DictConfig) -> list[str]:
    """Return the names of the GPUs that the jobs of this sweep share; none if they do not run in parallel on GPUs."""
    if _find_launcher() is None or Sweep.current is None:
        return []
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if Sweep.current.visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = Sweep.current.visible
    import torch

    count = torch.cuda.device_count() if TrainerSettings(**cfg.trainer).gpu else 0
    return name_devices(Sweep.current.visible, count)


def run_job(cfg: DictConfig, command: str) -> float | None:
    """Run a job of a sweep in a process of its own, with GPUs that no other job uses. Return its reward.

    command: the module of the command.
    """
    job, sweep, devices = HydraConfig.get(), Sweep.current, list_devices(cfg)
    folder = Path(job.runtime.output_dir)
    assert sweep is not None
    assert sweep.locks is not None
    record = sweep.path(job.job.num, "process")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith(RANK_PREFIXES)
    }
    if not PACKAGED.is_dir():  # a checkout, which need not be installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment["PYTHONSAFEPATH"] = "1"  # or files of the current folder could replace modules, for its ranks too
    with ExitStack() as stack:
        locks = dict[str, IO[str]]()
        if devices:
            locks = stack.enter_context(claim(devices, TrainerSettings(**cfg.trainer).local, sweep.locks))
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(locks)
        words = [sys.executable, "-m", command, *list_arguments(job, folder, record)]
        # The process inherits the locks, so that its GPUs stay claimed even if this process is killed.
        status = wait(words, environment, job.runtime.cwd, [file.fileno() for file in locks.values()])
    if status:
        end = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        raise JobFailed(record.read_text() if record.exists() else f"the job's process {end}")
    reward = read_summary(folder)["reward"]
    return None if reward is None else float(reward)


def list_arguments(job: HydraConf, folder: Path, record: Path) -> list[str]:
    """Return the command line of a job as a single run in `folder`.

    job: Hydra's configuration of the job.
    """
    sources = {source.provider: source.path for source in job.runtime.config_sources if source.schema == "file"}
    options = [f"--config-path={sources['main']}", f"--config-name={job.job.config_name}"]
    if "command-line" in sources:
        options.append(f"--config-dir={sources['command-line']}")
    sweeping = ("hydra.mode", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper")  # also hydra.sweeper
    others = [word for word in job.overrides.hydra if not word.lstrip("+~").startswith(sweeping)]
    own = [f"hydra.job.num={job.job.num}", f"hydra.run.dir={_quote(folder)}"]
    fields = {"record": _quote(record), "parallel": str(_find_launcher() is not None).lower()}
    own += [f"++hydra.callbacks.sweep.{name}={value}" for name, value in fields.items()]
    return [*options, *job.overrides.task, *others, *own]


def wait(command: Sequence[str], environment: Mapping[str, str], cwd: str, files: Sequence[int]) -> int:
    """Run a command and return its exit status. Pass signals on to it, and exit after it if there was one.

    files: the file descriptors that it inherits.
    """
    received, handlers = list[int](), dict[int, Any]()
    # A process group of its own, or Ctrl-C would reach it twice.
    process = subprocess.Popen(command, env=environment, cwd=cwd, pass_fds=files, process_group=0)

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    try:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals only to it
            handlers = {number: signal.signal(number, forward) for number in SIGNALS}
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received and received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    if received:
        sys.exit(128 + received[0])
    return status


def _find_launcher() -> str | None:
    """Return the name of the launcher if it runs several jobs at a time on this machine."""
    return LAUNCHERS.get(HydraConfig.get().launcher._target_.rpartition(".")[2])


def _write_once(path: Path, text: str) -> None:
    """Write a file unless it exists: the first of several failing ranks has the cause."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), path.open("x") as file:
        file.write(text)


def _quote(path: Path) -> str:
    """Return a path as a value in an override."""
    return "'" + str(path).replace("'", r"\'") + "'"
