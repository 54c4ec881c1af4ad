"""Start commands in forks of a process that has imported everything, and kill them at chosen events.

`python -m tests.helpers.killing` imports what is slow to import, then forks once per line of its standard input, a JSON
object with the arguments of `attempt`. `Driver` is the other end.

An event is something that a kill can interrupt: below `root` a file is opened for writing, written, renamed, linked or
removed; the model runs; the optimizer steps. The ranks, or the jobs of a sweep, write their events to <log>.events, one
per line after their number, and their output to <log>.out.
"""

import builtins
import ctypes
import errno
import importlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from tests.helpers.cli import ROOT
from var.utils import signals

# Audit events of changes in the file system, and the index of the argument with the path.
CHANGES = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.symlink": 1, "os.link": 1}

HEAVY = ("matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama", "var.evaluate.run")


PR_SET_CHILD_SUBREAPER = 36  # an option of Linux's prctl
WATCH = "VAR_WATCH"  # the environment variable with the arguments of a Watch, for the workers of a sweep
GRACE = 5.0  # seconds until a process ends whose parent was killed
PATIENCE = 100  # seconds until a process that outlives its command counts as left behind


class Watch:
    """Kill processes at an event of this one, or fill its disk from that event on.

    Args:
        root: the folder whose changes are events.
        log: the path of the logs, without its suffix.
        on: a pattern; only events that match it count.
        at: the number of the event, from 1. If it is a write, half of the data is written. None: no event.
        full: instead of killing the process, let all writes from this event on fail for lack of space.
        number: the signal. SIGKILL ends the process at once; after another one, it can save what it has.
        process: the number of the rank or job whose events count. None: each one counts its own.
        whom: self, or parent (the process that started this one), or all (the command's processes).
    """

    def __init__(
        self, root: str, log: str, on: str = "", at: int | None = None, full: bool = False,
        number: int = signal.SIGKILL, process: int | None = 0, whom: str = "self",
    ) -> None:  # fmt: skip
        self.root, self.log, self.on, self.full, self.number, self.whom = root, log, on, full, number, whom
        self.process, self.chosen = process, at
        self.events = os.open(f"{log}.events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def follow(self, process: int) -> None:
        """Record the events of this process as those of a rank or job. Let them count if it is the chosen one."""
        self.followed, self.count = process, 0
        self.at = self.chosen if self.process in (process, None) else None
        self.parent = os.getppid()

    def install(self) -> None:
        """Start watching."""
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]
        register_module_forward_pre_hook(
            lambda module, _: self.event("run", find_callers()) if hasattr(module, "embed_tokens") else None
        )
        register_optimizer_step_pre_hook(lambda *_: self.event(find_step(), "optimizer"))  # type: ignore[arg-type]
        sys.addaudithook(self._audit)

    def event(self, kind: str, what: str) -> None:
        """Record an event, and die if it is the one."""
        if self._is_due(kind, what) and not self.full:
            self._kill()

    def _kill(self) -> None:
        if self.whom == "all":
            os.killpg(0, self.number)
        if self.whom != "parent":
            os.kill(os.getpid(), self.number)
        elif os.getppid() == self.parent:  # another job can have killed it
            os.kill(self.parent, self.number)

    def _is_due(self, kind: str, what: str) -> bool:
        event = f"{kind} {what.removeprefix(self.root)}"
        os.write(self.events, f"{self.followed} {event}\n".encode())
        matches = re.search(self.on, event) is not None
        self.count += matches
        return self.at is not None and (self.count >= self.at if self.full else matches and self.count == self.at)

    def _inside(self, path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.root)

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and self._inside(path):
                self.event("open", os.fsdecode(path))
        elif name in CHANGES:
            path = arguments[CHANGES[name]]
            within = name in ("os.remove", "os.rmdir") and arguments[-1] not in (-1, None)  # of a tree that is removed
            if within or self._inside(path):
                self.event(name, os.fsdecode(path))

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            handle = real(file, mode, *arguments, **options)
            if set(mode) & set("wax+") and self._inside(file):
                handle.write = self._write(handle, handle.write, os.fsdecode(file))
            return handle

        return opened

    def _write(self, handle: Any, real: Callable[[Any], Any], path: str) -> Callable[[Any], Any]:
        def write(data: Any) -> Any:
            if not self._is_due("write", path):
                return real(data)
            data = data if isinstance(data, str) else memoryview(data).cast("B")
            real(data[: len(data) // 2])
            handle.flush()
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            self._kill()
            return real(data[len(data) // 2 :])

        return write


def find_callers() -> str:
    """Return the modules of this package that are being called, innermost first."""
    names = groupby(frame.f_globals.get("__name__", "") for frame in list_frames())
    return " < ".join(name.removeprefix("var.") for name, _ in names if name.startswith("var."))


def find_step() -> str:
    """Return "step", or "load" while torch creates the state of a sharded optimizer by an empty step."""
    return "load" if any(frame.f_code.co_name == "_init_optim_state" for frame in list_frames()) else "step"


def list_frames() -> Iterator[FrameType]:
    """Yield the frames of the calls that are running, innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


class WatchJob(Callback):
    """Watch each job of a sweep in the worker that runs it."""

    watch: Watch | None = None

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Follow the job. A worker can run several jobs."""
        if WatchJob.watch is None:
            signals.GRACE = GRACE
            WatchJob.watch = Watch(**json.loads(os.environ[WATCH]))
            tempfile.tempdir = f"{WatchJob.watch.root}/tmp"
            WatchJob.watch.install()
        WatchJob.watch.follow(HydraConfig.get().job.num)


def attempt(command: str, overrides: list[str], root: str, log: str, **stop: Any) -> None:
    """Run `python command overrides`, which writes below `root`, in this process. `stop` has arguments of Watch."""
    import torch

    printed = os.open(f"{log}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for descriptor, place in ((0, os.open(os.devnull, os.O_RDONLY)), (1, printed), (2, printed)):
        os.dup2(place, descriptor)
    torch.set_num_threads(1)
    tempfile.tempdir = f"{root}/tmp"  # so that temporary files are watched, too
    os.makedirs(tempfile.tempdir, exist_ok=True)
    sys.argv, rank = [str(ROOT / command), *overrides], 0
    if "-m" in overrides:
        os.environ[WATCH] = json.dumps({"root": root, "log": log, **stop})
        sys.argv.append(f"+hydra.callbacks.watch._target_=tests.helpers.killing.{WatchJob.__name__}")
    else:
        signals.GRACE = GRACE
        if "trainer.devices=2" in overrides:
            rank = fork_second_rank()
        watch = Watch(root, log, **stop)
        watch.install()
        watch.follow(rank)
    runpy.run_path(sys.argv[0], run_name="__main__")


def fork_second_rank() -> int:
    """Fork a process that becomes the second rank when Lightning starts it, and return the rank of this process.

    Lightning would start a new interpreter, which imports everything again.
    """
    import lightning.pytorch.strategies.launchers.subprocess_script as launcher

    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(write)
        with os.fdopen(read) as pipe:
            message = pipe.read()  # until the first rank has written it, or has ended
        if not message:
            os._exit(0)
        (_, *sys.argv), environment = json.loads(message)
        os.environ.clear()
        os.environ.update(environment)
        return 1
    os.close(read)

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        """The forked process, once it has its command line."""

        def __init__(self, command: list[str], env: dict[str, str], cwd: str | None) -> None:
            self.command, self.environment = command, env
            super().__init__(command)

        def _execute_child(self, *_: Any) -> None:
            self.pid, self._child_created = child, True
            with os.fdopen(write, "w") as pipe:
                json.dump([self.command, self.environment], pipe)

    vars(launcher)["subprocess"] = SimpleNamespace(Popen=Popen)
    return 0


def serve() -> None:
    """Fork until standard input ends. No thread may run before the last fork: its locks would stay locked.

    Print one JSON object per attempt: its exit status, the command lines of the processes that it left behind, and the
    seconds that its other processes ran after it.
    """
    from hydra.core.plugins import Plugins

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # the parent of processes whose parent has ended
    for module in HEAVY:
        importlib.import_module(module)
    Plugins.instance()  # imports every plugin
    for line in sys.stdin:
        if not (child := os.fork()):
            code = 1
            try:
                os.setpgid(0, 0)
                attempt(**json.loads(line))
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        started = time.monotonic()
        print(json.dumps([code, wait_for_others(), time.monotonic() - started]), flush=True)


def wait_for_others() -> list[str]:
    """Wait until all processes of an attempt have ended. Kill those that do not, and return their command lines."""
    ends, left = time.monotonic() + PATIENCE, list[str]()
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return left
        if time.monotonic() > ends:
            for child in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
                left.append(Path(f"/proc/{child}/cmdline").read_text().replace("\0", " "))
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


@dataclass(frozen=True)
class Attempt:
    """What became of an attempt."""

    code: int
    """Exit status, or minus the signal that ended the process."""
    printed: str
    """Standard output and errors."""
    log: list[tuple[int, str]]
    """The number of a rank or job and its event, in order."""
    stopped: str | None
    """The event at which it was stopped, or None."""
    survived: float
    """Seconds that its other processes ran after the first one."""

    @property
    def killed(self) -> bool:
        """Whether it was stopped."""
        return self.stopped is not None

    @property
    def events(self) -> list[str]:
        """The events of the first rank or job."""
        return [event for process, event in self.log if process == 0]

    @property
    def place(self) -> str:
        """The last event."""
        return self.events[-1] if self.events else "the beginning"


class Driver:
    """Starts attempts from a test."""

    def __init__(self, logs: Path) -> None:
        self.log = logs / "attempt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.helpers.killing"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)

    def start(self, command: str, overrides: list[str], root: Path, **stop: Any) -> Attempt:
        """Run a command until it ends or `stop`, arguments of Watch, ends it. No process may be left behind."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        root.mkdir(parents=True, exist_ok=True)
        self.log.with_suffix(".events").write_text("")
        job = {"command": command, "overrides": overrides, "root": str(root), "log": str(self.log), **stop}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code, left, survived = json.loads(self.process.stdout.readline())
        printed, events = (self.log.with_suffix(suffix).read_text() for suffix in (".out", ".events"))
        assert not left, f"{left} outlived {overrides}\n{printed}"
        log = [(int(line[0]), line[2:]) for line in events.splitlines()]
        at, on, process = stop.get("at"), stop.get("on", ""), stop.get("process", 0)
        counted = [
            [event for number, event in log if number == own and re.search(on, event)]
            for own in ((0, 1) if process is None else (process,))
        ]
        stopped = next((events[at - 1] for events in counted if at is not None and len(events) >= at), None)
        return Attempt(code, printed, log, stopped, survived)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    serve()
