"""Train in this process or in others, and compare what runs leave behind."""

import csv
import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch.testing import assert_close

ROOT = Path(__file__).parents[2]
PRELOADED = [
    "var.training.run", "var.report.write", "datasets", "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp", "transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama",
]  # fmt: skip

Result = tuple[Any, dict[str, torch.Tensor], list[dict[str, str]]]
"""A run, its policy's weights, and the rows of its metrics.csv."""


class Killed(Exception):
    """Raised by a test to kill a run."""


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """Write a JSON Lines file; return its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def composed(*overrides: str, root: str = "train", **options: Any) -> Any:
    """Compose the configuration `root` with overrides."""
    import var.config.check  # noqa: F401  it registers the resolvers

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(root, list(overrides), **options)


def fit(options: list[str], folder: Path, *more: str) -> Result:
    """Train as train.py does, up to its summary."""
    from var.training.run import Run

    folder.mkdir(parents=True, exist_ok=True)
    run = Run.compose(composed(*options, *more), folder)
    torch.manual_seed(0)
    trainer, module = run.trainer(), run.module()
    trainer.fit(module, run.data, ckpt_path=run.checkpoint)
    return run, {name: value.clone() for name, value in module.policy.state_dict().items()}, curve(folder)


def kill_and_resume(
    owner: type, method: str, entry: Callable[[Any], Any], kill_at: Callable[[Result], int], options: list[str],
    folder: Path, *more: str,
) -> tuple[Result, Result, list[Any], list[Any], list[Any]]:  # fmt: skip
    """Train without a break, and again with a kill at a call of a method of `owner`.

    The killed run resumes on another machine, whose clock shows the year 2000.
    `kill_at` maps the unbroken run to the number of that call. Return the unbroken and the resumed run, and `entry` of
    what the method returned: in the unbroken run, before the kill, and after it.
    """
    real, seen, killed = getattr(owner, method), list[Any](), [-1]

    def watched(self: Any, *arguments: Any) -> Any:
        if len(seen) == killed[0]:
            raise Killed
        result = real(self, *arguments)
        seen.append(entry(result))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, watched)
        straight = fit(options, folder / "straight", *more)
        unbroken, seen[:], killed[0] = list(seen), [], kill_at(straight)
        with pytest.raises(Killed):
            fit(options, folder / "killed", *more)
        before, seen[:], killed[0] = list(seen), [], -1
        patch.setattr("time.time", lambda: 946_684_800.0)
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        patch.setenv("HOSTNAME", "elsewhere")
        resumed = fit(options, folder / "killed", *more)
    return straight, resumed, unbroken, before, seen


def launch(processes: int, *arguments: str, script: str = "train.py", timeout: float = 300) -> None:
    """Run a script on several processes, as torchrun does.

    They are forked from one that has imported the libraries, which takes longer than most of these runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free, tempfile.TemporaryDirectory() as logs:
        free.bind(("127.0.0.1", 0))
        common = {
            **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": Path(logs).name,
        }  # fmt: skip
        free.close()
        ranks, words = [], [str(ROOT / script), *arguments]
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | common if processes > 1 else dict(os.environ)
            ranks.append(context.Process(target=_run_rank, args=(words, own, f"{logs}/{rank}")))
            ranks[-1].start()
        ends = time.monotonic() + timeout
        while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
            connection.wait([rank.sentinel for rank in ranks if rank.exitcode is None], ends - time.monotonic())
            if time.monotonic() > ends:
                break
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        printed = [path.read_text(errors="replace") for path in sorted(Path(logs).iterdir())]
        assert codes == [0] * processes, "\n".join(printed)


def _run_rank(words: list[str], environment: dict[str, str], log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    gc.freeze()  # leave what the first process has imported out of garbage collections
    runpy.run_path(words[0], run_name="__main__")


def curve(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(curve: list[dict[str, str]], name: str) -> list[float]:
    """Return a metric at the steps at which it was logged."""
    return [float(row[name]) for row in curve if row.get(name)]


def run_folder(runs: Path) -> Path:
    """Return the folder of the only run in `runs`."""
    (found,) = (path for path in runs.iterdir() if path.is_dir())
    return found


def exported(runs: Path) -> dict[str, torch.Tensor]:
    """Return the exported weights of the only run in `runs`."""
    return load_file(run_folder(runs) / "model" / "model.safetensors")


def same_folders(one: Path, two: Path, *names: str) -> None:
    """Assert equal exported weights and metrics, up to the rounding of another number of processes."""
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert_close(b, a, rtol=1e-4, atol=1e-5)
    for name in names:
        assert_close(column(curve(two), name), column(curve(one), name), rtol=1e-4, atol=1e-5)


def assert_same(
    a: Result, b: Result, *names: str, rtol: float = 1e-8, atol: float = 1e-9, weights: bool = True
) -> None:
    """Assert equal weights and metrics of two runs."""
    for name in names or ("train/loss", "train/grad_norm", "train/lr"):
        assert_close(column(a[2], name), column(b[2], name), rtol=rtol, atol=atol)
    if weights:
        assert_close(a[1], b[1], rtol=rtol, atol=atol)


def find_scale(a: Result, b: Result, *names: str, rtol: float = 1e-5) -> float:
    """Assert that the metrics of two runs differ by one constant factor; return it."""
    ratios = [x / y for name in names for x, y in zip(column(a[2], name), column(b[2], name), strict=True)]
    assert ratios == pytest.approx(ratios[:1] * len(ratios), rel=rtol)
    return ratios[0]


def assert_identical(a: Result, b: Result, *names: str) -> None:
    """Assert equal weights and metrics of two runs to the last bit."""
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    for name in names:
        assert column(a[2], name) == column(b[2], name), name
