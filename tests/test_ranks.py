"""Every objective on one process, in twice as many micro-batches, and on two ranks under each strategy: one curve."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.test_trajectory import ROOT, column
from tests.test_trajectory_online import options  # noqa: F401  a fixture
from var.config import FOLDER

LOSSES = sorted(path.stem for path in Path(FOLDER, "loss").glob("*.yaml"))
pytestmark = [pytest.mark.trajectory, pytest.mark.long]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 prompts with two to four weighted answers of different lengths."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(13):
            texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(2, 14))) + "z" for _ in range(2 + i % 3)]
            responses = [{"text": text, "weight": draw.uniform(0.5, 1.5)} for text in texts]
            file.write(json.dumps({"id": f"r{i}", "prompt": f"question {i}?", "responses": responses}) + "\n")
    return path


def chosen(loss: str) -> list[str]:
    """What a loss needs beside its own file on so little data."""
    own = {
        "var_sampled": ["loss.estimator.candidates=3"],
    }
    return [
        f"loss={loss}", *own.get(loss, []),
        *(["loss.value.development_prompts=2", "loss.value.epochs=2", "loss.value.largest=20"]
          if loss.startswith("alol") else []),
    ]  # fmt: skip


def ran(jobs: list[tuple[Path, list[str]]], where: Path, processes: int) -> None:
    where.write_text(json.dumps([[str(folder), overrides] for folder, overrides in jobs]))
    start = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
                               if processes > 1 else [])]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, str(ROOT / "tests" / "ranks.py"), str(where)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_every_objective_is_one_curve_on_any_number_of_processes(
    options: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """In float64. 13 prompts leave a short last step, in which a rank has less to do than the other or nothing."""
    common = [*options, "data.global_batch=4", "trainer.epochs=1"]
    ways = {
        "one": (1, ["data.micro_batch=2"]),
        "accumulated": (1, ["data.micro_batch=1"]),
        "ddp": (2, ["data.micro_batch=2", "strategy=ddp", "trainer.devices=2"]),
        "fsdp": (2, ["data.micro_batch=2", "strategy=fsdp", "trainer.devices=2"]),
    }
    for processes in (1, 2):
        jobs = [
            (tmp_path / way / loss, [*common, *chosen(loss), *more])
            for way, (count, more) in ways.items() if count == processes
            for loss in LOSSES if not (way == "accumulated" and micro_batch_matters(loss))
        ]  # fmt: skip
        ran(jobs, tmp_path / f"{processes}.json", processes)

    found: dict[tuple[str, str], Any] = {}
    for way in ways:
        for loss in LOSSES:
            folder = tmp_path / way / loss
            if folder.exists():
                with (folder / "metrics.csv").open(newline="") as file:
                    found[way, loss] = (list(csv.DictReader(file)), torch.load(folder / "weights.pt"))
    apart = []
    for (way, loss), (curve, weights) in found.items():
        expected, straight = found["one", loss]
        assert max(column(expected, "train/grad_norm")) > 0, loss
        try:
            for name in ("train/loss", "train/grad_norm", "train/lr"):
                assert_close(column(curve, name), column(expected, name), rtol=1e-6, atol=1e-7)
            assert_close(weights, straight, rtol=1e-6, atol=1e-7)
        except AssertionError as error:
            apart.append(f"{way} {loss}: {str(error)[:300]}")
    assert not apart, "\n".join(apart)
    assert len(found) >= 3 * len(LOSSES)


def micro_batch_matters(loss: str) -> bool:
    """Z, or KTO's pairs, are taken within a micro-batch: another B is another objective, as the paper says."""
    return loss in ("var", "var_own", "var_sum", "kto")
