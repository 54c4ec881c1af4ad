"""The end of a run: the model is exported before its evaluation, in the dtype of its base, and the state is removed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.helpers.cli import check_run, read_summary, run
from tests.helpers.models import saved, tiny_model
from tests.helpers.runs import launch, run_folder
from var.training.module import AlignmentModule
from var.training.validation import Validation


@pytest.fixture
def command(options: list[str]) -> list[str]:
    """Return the overrides of a short run with an evaluation by a reward of text."""
    return [
        *options, "data.validation_prompts=2", "eval.sampling.responses=2", "eval.sampling.max_new_tokens=4",
        "+reward@eval.reward=sentiment", "trainer.precision=32-true", "trainer.max_steps=2", "data.micro_batch=4",
        "data.global_batch=4",
    ]  # fmt: skip


def fail(*_: Any) -> None:
    """End the process, in place of a method."""
    raise SystemExit(143)


def test_run_killed_in_its_last_evaluation_keeps_its_model(command, tmp_path, monkeypatch):
    """It is finished with or without an evaluation, in the same folder, and neither trains nor exports again."""
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "_divergence", fail)
        assert run("train.py", *command).returncode != 0
    folder = run_folder(tmp_path / "runs")
    model, card = folder / "model" / "model.safetensors", folder / "model" / "README.md"
    exported = model.stat().st_mtime_ns
    assert "| not evaluated | | |" in card.read_text()
    assert not (folder / "summary.json").exists()
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *_: pytest.fail("trained"))
    check_run("train.py", *command, "eval=off")
    summary = read_summary(folder)
    assert (summary["steps"], summary["validation"], summary["reward"]) == (2, {}, None)
    assert not (folder / "checkpoints").exists()
    printed = check_run("train.py", *command)
    assert "This run was finished with other evaluation settings than eval.enabled=True" in printed
    assert f"python eval.py init={folder}" in printed.replace("\n", "")
    assert model.stat().st_mtime_ns == exported


def test_what_is_marked_complete_is_on_the_disk(command, tmp_path, monkeypatch):
    """Before a marker has its name, all files that it marks are synced in their last state, and their folders."""
    synced, missing = set[tuple[int, int]](), dict[str, list[str]]()
    sync, rename = os.fsync, Path.replace

    def state(stat: os.stat_result) -> tuple[int, int]:
        return stat.st_ino, stat.st_mtime_ns

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        synced.add(state(os.fstat(descriptor)))

    def replace(self: Path, target: Path) -> Path:
        marked = {"summary.json": target.parent, "exported": target.parents[1] / "model"}.get(target.name, self)
        if not self.is_symlink():
            files = [self, *(file for file in marked.rglob("*") if not file.is_symlink() and not file.is_dir())]
            files += [file for file in (marked, *marked.rglob("*")) if file.is_dir() and file != self.parent]
            missing[target.name] = [str(file) for file in files if state(file.stat()) not in synced]
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    check_run("train.py", *command, "trainer.keep_checkpoint=true")
    assert {name: files for name, files in missing.items() if files} == {}
    assert {"summary.json", "exported", "model", "step-2.ckpt", "step-2.sha256"} <= missing.keys()


def test_run_killed_in_its_last_evaluation_is_evaluated_by_the_same_command(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "_divergence", fail)
        run("train.py", *command)
    folder = run_folder(tmp_path / "runs")
    exported = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *_: pytest.fail("trained"))
    check_run("train.py", *command)
    assert read_summary(folder)["validation"]["kl"]["mean"] != 0
    assert "| validation reward |" in (folder / "model" / "README.md").read_text()
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == exported


def test_training_is_the_same_without_an_evaluation(command, tmp_path):
    """The plan keeps the validation prompts apart, so the weights are equal to the last bit."""
    weights = []
    for name, more in (("with", ["trainer.keep_checkpoint=true"]), ("without", ["eval=off"])):
        check_run("train.py", *command, *more, f"runs={tmp_path}/{name}")
        folder = run_folder(tmp_path / name)
        weights.append(load_file(folder / "model" / "model.safetensors"))
        assert (folder / "checkpoints" / "last.ckpt").exists() == (name == "with")
        assert (folder / "samples.jsonl").exists() == (name == "with")
    assert run_folder(tmp_path / "with").name == run_folder(tmp_path / "without").name
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_model_is_exported_in_the_dtype_of_its_base(command, tmp_path):
    """Training in float32 from bf16 weights; export_dtype=float32 keeps all bits. config.json names the dtype."""
    base = saved(tmp_path / "half", tiny_model(dtype=torch.bfloat16))
    found = {}
    for dtype in ("base", "float32"):
        more = (f"model.path={base}", "model.dtype=float32", "eval=off", f"trainer.export_dtype={dtype}")
        check_run("train.py", *command, *more, f"runs={tmp_path}/{dtype}")
        folder = run_folder(tmp_path / dtype) / "model"
        found[dtype] = load_file(folder / "model.safetensors")
        kind = "bfloat16" if dtype == "base" else "float32"
        assert json.loads((folder / "config.json").read_text())["dtype"] == kind
    assert found["base"].keys() == found["float32"].keys()
    for name, weight in found["float32"].items():
        assert weight.dtype == torch.float32
        assert torch.equal(found["base"][name], weight.bfloat16())


@pytest.mark.long
def test_sharded_model_is_exported_in_the_dtype_of_its_base(command, tmp_path):
    """Two processes, in float32 and in bf16-mixed, which gathers bf16 weights; the export is of the float32 shards."""
    base = saved(tmp_path / "half", tiny_model(dtype=torch.bfloat16))
    common = [*command, f"model.path={base}", "model.dtype=float32", "eval=off", "trainer.export_dtype=float32",
              "data.micro_batch=2"]  # fmt: skip
    launch(1, *common, f"runs={tmp_path}/one")
    launch(2, *common, "strategy=fsdp", "trainer.devices=2", f"runs={tmp_path}/two")
    one, two = (load_file(run_folder(Path(tmp_path, n)) / "model" / "model.safetensors") for n in ("one", "two"))
    assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in two.values())
