"""Starts commands in children of one warm process and stops them, to the event, where a test says.

`python killing.py` imports everything heavy once and forks a child for each line of JSON on its standard input, the
arguments of `attempt`; Driver is its other end. What a child does that a kill can split is an event: under `root` a
file is opened to be written, written, renamed, linked or removed; the model runs; the optimiser steps. The child's
events stand in <log>.events, one a line, what it printed in <log>.out.
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

ROOT = Path(__file__).parents[2]
# Audit events of a file system that changes, and which of their arguments names the place.
CHANGES = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.symlink": 1, "os.link": 1}

HEAVY = ("matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama", "var.evaluate.run")


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """A reward in [0, 1] that differs from answer to answer: the share of distinct characters."""

    scores_text = True
    identity = {"program": "distinct"}  # noqa: RUF012

    def __call__(self, prompts: Any, responses: list[str], answers: Any) -> list[float]:
        return [len(set(text)) / max(8, len(text)) for text in responses]


class Watch:
    """At the event number `at` (from 1) of those in which the pattern `on` is found the process dies, a write half
    done; with `full` it lives, and from then on no write finds room on the disk."""

    def __init__(self, root: str, events: int, on: str, at: int | None, full: bool) -> None:
        self.root, self.events, self.on, self.at, self.full = root, events, on, at, full
        self.count = 0

    def install(self) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]
        register_module_forward_pre_hook(
            lambda module, _: self.event("run", type(module).__name__) if hasattr(module, "embed_tokens") else None
        )
        register_optimizer_step_pre_hook(lambda *_: self.event("step", "optimiser"))  # type: ignore[arg-type]
        sys.addaudithook(self._audit)

    def event(self, kind: str, what: str) -> None:
        if self._is_due(kind, what) and not self.full:
            os.kill(os.getpid(), signal.SIGKILL)

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
            within = name in ("os.remove", "os.rmdir") and arguments[-1] not in (-1, None)  # of a tree that goes
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
            os.kill(os.getpid(), signal.SIGKILL)

        return write


def attempt(
    command: str,
    overrides: list[str],
    root: str,
    log: str,
    on: str = "",
    at: int | None = None,
    full: bool = False,
    seconds: float | None = None,
) -> None:
    """`python command overrides` in this process. on, at, full: see Watch; seconds: die after so long, wherever
    that is."""
    import torch

    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    printed, events = (os.open(f"{log}.{kind}", flags) for kind in ("out", "events"))
    for descriptor, place in ((0, os.open(os.devnull, os.O_RDONLY)), (1, printed), (2, printed)):
        os.dup2(place, descriptor)
    torch.set_num_threads(1)
    tempfile.tempdir = f"{root}/tmp"  # what is written there is watched too
    os.makedirs(tempfile.tempdir, exist_ok=True)
    sys.argv = [str(ROOT / command), *overrides]
    if seconds:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles SIGALRM: the process ends at once
    Watch(root, events, on, at, full).install()
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve() -> None:
    """Until standard input ends. No thread may run before the last fork: a lock that one holds would stay held."""
    from hydra.core.plugins import Plugins

    for module in HEAVY:
        importlib.import_module(module)
    Plugins.instance()  # it imports every plugin
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
    """code: exit status, or minus the signal that ended it."""

    code: int
    printed: str
    events: list[str]

    @property
    def killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGALRM)

    @property
    def place(self) -> str:
        """Where it ended."""
        return self.events[-1] if self.events else "the start"


class Driver:
    """The warm process, seen from a test."""

    def __init__(self, logs: Path) -> None:
        self.log = logs / "attempt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, command: str, overrides: list[str], root: Path, **stop: Any) -> Attempt:
        """One attempt, to its end or where `stop` (on, at, full, seconds of `attempt`) ends it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        root.mkdir(parents=True, exist_ok=True)
        job = {"command": command, "overrides": overrides, "root": str(root), "log": str(self.log), **stop}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        printed, events = (self.log.with_suffix(suffix).read_text() for suffix in (".out", ".events"))
        return Attempt(code, printed, events.splitlines())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    serve()
