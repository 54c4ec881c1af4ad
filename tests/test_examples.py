"""The custom loss, data set and reward of examples/: each one alone, and all of them in one run of train.py."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.helpers.cli import run
from tests.helpers.runs import ROOT
from tests.helpers.runs import run_folder as only
from var.data.read import read
from var.models.packing import pack

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set PYTHONPATH=examples in the repository's root folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(ROOT)


def test_slic_is_a_hinge_on_the_difference() -> None:
    """Pairs (−1, −3) and (−2, −2.5) at δ = 1: max(0, 1 − 2) + max(0, 1 − 0.5) = 0.5, over 2 pairs: 0.25.

    Only the second pair has a gradient: −1/2 and 1/2.
    """
    from slic import SLiC

    logps = torch.tensor([-0.4, -0.6, -3.0, -2.0, -2.5], requires_grad=True)
    ids, starts = [[1, 2, 3], [1, 2], [1, 2], [1, 2]], [1, 1, 1, 1]
    batch = pack(ids, starts, global_sequences=4.0)
    loss, _ = SLiC(margin=1.0)(logps, batch)
    assert_close(loss, torch.tensor(0.25))
    loss.backward()
    assert_close(logps.grad, torch.tensor([0.0, 0.0, 0.0, -0.5, 0.5]))


@pytest.mark.parametrize(("file", "name"), [("slic", "SLiC"), ("capped", "CappedVAR")])
def test_loss_in_the_docs_is_the_example(file: str, name: str) -> None:
    """docs/losses.md shows it without checks."""
    page = (ROOT / "docs" / "losses.md").read_text()
    (shown,) = re.findall(rf"```python\n[^`]*?(@dataclass[^`]*?class {name}:.*?)```", page, re.S)
    code = (EXAMPLES / f"{file}.py").read_text()
    for line in shown.splitlines():
        if '"""' not in line:
            assert line.strip() in code, line


def test_capped_weights_are_bounded() -> None:
    """Weights 0.5 and 4, limited to 2, on 1 and 2 tokens of −1 nat: (0.5 + 2 · 2) / 3."""
    from capped import CappedVAR

    batch = pack([[1, 2], [1, 2, 3]], [1, 1], global_tokens=3.0, weights=torch.tensor([0.5, 4.0]))
    loss, _ = CappedVAR(largest=2.0)(-torch.ones(3), batch)
    assert_close(loss, torch.tensor(1.5))


@pytest.mark.long
def test_capped_weights_train(tiny_folder: Path, tmp_path: Path) -> None:
    done = run(
        "train.py", "--config-dir", "examples/conf", "loss=capped", "loss.largest=1.1", "data=questions",
        "reward=brevity", f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/annotations",
        f"cache={tmp_path}/cache", f"runs={tmp_path}/runs", "trainer.accelerator=cpu", "trainer.epochs=1", "eval=off",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((only(tmp_path / "runs") / "summary.json").read_text())
    assert summary["steps"] > 0


def test_questions_reads_rows_and_reports_bad_lines(tmp_path: Path) -> None:
    from questions import Questions

    rows = read(Questions(path="examples/questions.tsv"), tmp_path / "cache")
    assert len(rows) == 16
    assert {len(row.responses) for row in rows} == {3}
    (tmp_path / "bad.tsv").write_text("Why?\tSo.\nAnd why?\n")
    with pytest.raises(ValueError, match=r"bad\.tsv:2: no answer after the question"):
        read(Questions(path=str(tmp_path / "bad.tsv")), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data\.path=nowhere: no such file"):
        Questions(path="nowhere")


def test_brevity_is_the_relative_distance_in_words() -> None:
    from brevity import Brevity

    assert Brevity(words=4)([[]] * 3, ["a b c d", "a", "a b c d e f"], [None] * 3) == [0.0, -0.75, -0.5]
    with pytest.raises(ValueError, match=r"reward\.words"):
        Brevity(words=0)


def test_relative_length_compares_with_the_prompt() -> None:
    """Lengths 2, 4 | 3 have the means 3 | 3: 2/3, 4/3 limited to 1.2, and 1. α = 1: weights e^{1/3}, e^{−0.2}, 1."""
    from length_penalty import LengthPenalty, ProvideRelativeLength

    loss = LengthPenalty(alpha=1.0, limit=1.2)
    provider = ProvideRelativeLength(loss.requires[0])
    data = SimpleNamespace(sequences=SimpleNamespace(length=np.array([2, 4, 3]), group=np.array([0, 0, 1])))
    provider.select(data)
    fields = provider.batch_fields(data, 0, np.array([0, 1, 2]))
    assert_close(fields["relative_length"], torch.tensor([2 / 3, 1.2, 1.0]))
    batch = pack([[0, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 1]], [1, 1, 1], global_tokens=9.0, extra=fields)
    value, _ = loss(-torch.ones(9), batch)
    assert_close(value, torch.tensor((2 * math.exp(1 / 3) + 4 * math.exp(-0.2) + 3) / 9))


@pytest.mark.long
def test_all_three_train_together(tiny_folder: Path, tmp_path: Path) -> None:
    """The README's first command, on a tiny model: the loss falls. An invalid margin is an error."""
    command = ["--config-dir", "examples/conf", "loss=slic", "data=questions", "reward=brevity"]
    done = run(
        "train.py", *command, f"model.path={tiny_folder}",
        f"annotation_cache={tmp_path}/annotations", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.epochs=3",
        "eval.sampling.responses=1", "eval.sampling.max_new_tokens=3", "model.learning_rate=3e-3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = only(tmp_path / "runs")
    assert folder.name.startswith(f"{tiny_folder.name}_questions_slic-")
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 9
    assert losses[-1] < losses[0]
    assert json.loads((folder / "summary.json").read_text())["validation"]["reward"]["after"]["mean"] < 0

    invalid = subprocess.run(
        [sys.executable, "train.py", *command, "loss.margin=-1", f"model.path={tiny_folder}", f"runs={tmp_path}/runs"],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)}, capture_output=True, text=True,
    )  # fmt: skip
    assert invalid.returncode == 1, invalid.stdout
    assert "loss.margin: expected a number > 0 (δ in nats), got -1" in invalid.stderr


def test_a_requirement_outside_the_package_trains(tiny_folder: Path, tmp_path: Path) -> None:
    """The loss with its own requirement trains, and at α = 0 it is SFT to the last bit."""
    losses = {}
    for name, more in (("length_penalty", ("loss.alpha=0",)), ("sft", ()), ("penalized", ())):
        done = run(
            "train.py", "--config-dir", "examples/conf", f"loss={name.replace('penalized', 'length_penalty')}", *more,
            "data=questions", "reward=brevity", f"model.path={tiny_folder}", f"runs={tmp_path}/{name}",
            f"annotation_cache={tmp_path}/annotations", f"cache={tmp_path}/cache", "trainer.accelerator=cpu",
            "trainer.log_every_n_steps=1", "trainer.max_steps=2", "data.validation_prompts=0",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with (only(tmp_path / name) / "metrics.csv").open() as file:
            losses[name] = [row["train/loss"] for row in csv.DictReader(file)]
    assert losses["length_penalty"] == losses["sft"] != losses["penalized"]
