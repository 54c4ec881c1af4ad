"""Start commands in forks of a process that has imported everything, and kill them at chosen events.

`python -m tests.helpers.killing` imports what is slow to import, then forks once per line of its standard input, a JSON
object with the arguments of `attempt`. `Driver` is the other end.

An event is something that a kill can interrupt: below `root` a file is opened for writing, written, renamed, linked or
removed; the model runs; the optimizer steps. The events of a fork are written to <log>.events, one per line, and its
output to <log>.out.
"""

import builtins
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.cli import ROOT

# Audit events of changes in the file system, and the index of the argument with the path.
CHANGES = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.symlink": 1, "os.link": 1}

HEAVY = ("matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama", "var.evaluate.run")


class Watch:
    """Kill this process at an event, or fill its disk from that event on.

    Args:
        root: the folder whose changes are events.
        events: the file descriptor to which events are written.
        on: a pattern; only events that match it count.
        at: the number of the event, from 1. If it is a write, half of the data is written. None: no event.
        full: instead of killing the process, let all writes from this event on fail for lack of space.
        number: the signal. SIGKILL ends the process at once; after another one, it can save what it has.
    """

    def __init__(self, root: str, events: int, on: str, at: int | None, full: bool, number: int) -> None:
        self.root, self.events, self.on, self.at, self.full, self.number = root, events, on, at, full, number
        self.count = 0

    def install(self) -> None:
        """Start watching."""
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]
        register_module_forward_pre_hook(
            lambda module, _: self.event("run", type(module).__name__) if hasattr(module, "embed_tokens") else None
        )
        register_optimizer_step_pre_hook(lambda *_: self.event("step", "optimizer"))  # type: ignore[arg-type]
        sys.addaudithook(self._audit)

    def event(self, kind: str, what: str) -> None:
        """Record an event, and die if it is the one."""
        if self._is_due(kind, what) and not self.full:
            os.kill(os.getpid(), self.number)

    def _is_due(self, kind: str, what: str) -> bool:
        event = f"{kind} {what.removeprefix(self.root)}"
        os.write(self.events, f"{event}\n".encode())
        self.count += re.search(self.on, event) is not None
        return self.at is not None and (self.count >= self.at if self.full else self.count == self.at)

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
            os.kill(os.getpid(), self.number)
            return real(data[len(data) // 2 :])

        return write


def attempt(
    command: str, overrides: list[str], root: str, log: str, on: str = "", at: int | None = None, full: bool = False,
    number: int = signal.SIGKILL,
) -> None:  # fmt: skip
    """Run `python command overrides`, which writes below `root`, in this process. `log` has no suffix."""
    import torch

    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    printed, events = (os.open(f"{log}.{kind}", flags) for kind in ("out", "events"))
    for descriptor, place in ((0, os.open(os.devnull, os.O_RDONLY)), (1, printed), (2, printed)):
        os.dup2(place, descriptor)
    torch.set_num_threads(1)
    tempfile.tempdir = f"{root}/tmp"  # so that temporary files are watched, too
    os.makedirs(tempfile.tempdir, exist_ok=True)
    sys.argv = [str(ROOT / command), *overrides]
    Watch(root, events, on, at, full, number).install()
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve() -> None:
    """Fork until standard input ends. No thread may run before the last fork: its locks would stay locked."""
    from hydra.core.plugins import Plugins

    for module in HEAVY:
        importlib.import_module(module)
    Plugins.instance()  # imports every plugin
    for line in sys.stdin:
        if not (child := os.fork()):
            code = 1
            try:
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
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@dataclass(frozen=True)
class Attempt:
    """What became of an attempt."""

    code: int
    """Exit status, or minus the signal that ended the process."""
    printed: str
    """Standard output and errors."""
    events: list[str]
    """Events, in order."""

    @property
    def killed(self) -> bool:
        """Whether the process was killed."""
        return self.code == -signal.SIGKILL

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
        """Run a command until it ends or `stop`, arguments of `attempt`, ends it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        root.mkdir(parents=True, exist_ok=True)
        job = {"command": command, "overrides": overrides, "root": str(root), "log": str(self.log), **stop}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        printed, events = (self.log.with_suffix(suffix).read_text() for suffix in (".out", ".events"))
        return Attempt(code, printed, events.splitlines())

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    serve()
