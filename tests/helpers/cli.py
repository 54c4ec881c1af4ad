"""Run this project's commands as a user does, and read what they leave behind."""

import io
import json
import os
import random
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

from tests.helpers.runs import ROOT, write_lines


def run(command: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python command overrides` in this process, so that imports are paid once.

    The curves of a run are not drawn, which would take a third of a tiny run's time.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    arguments = [str(ROOT / command), *overrides]
    patched = mock.patch.object(sys, "argv", arguments), mock.patch.dict(os.environ, environment)
    with patched[0], patched[1], mock.patch("var.report.write.plot"), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def check_run(command: str, *overrides: str, **environment: str) -> str:
    """Run a command, assert that it succeeds, and return what it printed."""
    done = run(command, *overrides, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_error(message: str, *overrides: str, command: str = "train.py", **environment: str) -> str:
    """Run a command, assert that it ends with a single error containing `message`, and return what it printed there."""
    done = run(command, *overrides, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr, done.stderr
    assert sum(line.startswith("Error: ") for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def spawn(*command: str) -> "subprocess.Popen[str]":
    """Start Python in a process of its own, for commands that a test kills or a launcher multiplies."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], text=True, env=environment, **pipes)


def write_to(folder: Path) -> list[str]:
    """Return the overrides with which a run writes only below `folder`."""
    return [f"annotation_cache={folder}/store", f"cache={folder}/cache", f"runs={folder}/runs"]


def write_rows(path: Path, prompts: int, responses: int = 2, seed: int = 0, before: str = " ") -> Path:
    """Write prompts with an answer and random responses, which have a score and a weight. Every third is truncated.

    before: what separates the number at the end of a response from its letters.
    """
    draw = random.Random(seed)

    def response(k: int) -> dict[str, Any]:
        text = "".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) + f"{before}{k}"
        return {"text": text, "score": draw.gauss(0, 1), "weight": draw.uniform(0.5, 1.5), "finished": k != 2}

    records = [
        {"id": f"r{i}", "prompt": f"{i}?", "answer": "1", "responses": [response(k) for k in range(responses)]}
        for i in range(prompts)
    ]
    return write_lines(path, records)


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary.json of a run."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def read_summaries(runs: Path) -> dict[Path, dict[str, Any]]:
    """Return the summary of each finished run in `runs`, by the run's folder."""
    return {path.parent: read_summary(path.parent) for path in sorted(runs.glob("*/summary.json"))}
