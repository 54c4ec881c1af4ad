"""Damaged files, and paths that cannot be written, end a command with one line that names the file."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.cli import check_error, check_run, run
from tests.helpers.models import save_lora, saved
from tests.helpers.runs import run_folder
from var.training.module import AlignmentModule

pytestmark = pytest.mark.e2e
SHORT = ["trainer.max_steps=2", "data.micro_batch=4", "data.global_batch=4", "eval=off", "trainer.precision=32-true"]


def write(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """Return what writes a file of a folder."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def split_weights(index: str) -> Callable[[Path], Any]:
    """Return what moves the weights to another file and writes an index, as of a model in several files."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def change_config(**values: Any) -> Callable[[Path], Any]:
    """Return what changes values of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights are pickled": (pickle_weights, "it has no .safetensors file, and pickled weights are not read"),
    "weights are empty": (write("model.safetensors", b""), "its weights cannot be read (Error"),
    "weights are cut": (
        write("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
        "its weights cannot be read (Error",
    ),
    "no weights": (write("model.safetensors", b"\x02\0\0\0\0\0\0\0{}"), "lacks weights"),
    "config is cut": (write("config.json", '{"model_type": "ll'), "config.json"),
    "config is a list": (write("config.json", "[]"), "cannot be read"),
    "config is not text": (write("config.json", b"\xff\xfe\0"), "config.json"),
    "config has wrong types": (change_config(hidden_size="x"), "expected int, got str"),
    "config has wrong names": (change_config(architectures=[3]), "architectures must be a list of names"),
    "config has large sizes": (change_config(hidden_size=2**46), "its weights need more memory than there is"),
    "config has no sizes": (write("config.json", "{}"), "cannot be read"),
    "tokenizer is cut": (write("tokenizer.json", '{"version": "1.0"'), "tokenizer"),
    "tokenizer has wrong types": (write("tokenizer.json", '{"model": 3}'), "tokenizer"),
    "generation config": (write("generation_config.json", "["), "generation_config.json: cannot be read"),
    "end tokens": (write("generation_config.json", '{"eos_token_id": "x"}'), "the end tokens ['x']. Expected numbers"),
    "index is cut": (split_weights("{"), "index.json: cannot be read"),
    "index is a list": (split_weights("[]"), "index.json: cannot be read"),
    "index is nested": (split_weights("[" * 100_000), "index.json: cannot be read"),
    "index has no files": (split_weights('{"metadata": {}}'), "index.json: expected metadata, and weight_map"),
    "index names numbers": (split_weights('{"metadata": {}, "weight_map": {"a": 3}}'), "index.json: expected metadata"),
    "index names another folder": (
        split_weights('{"metadata": {}, "weight_map": {"lm_head.weight": "../part.safetensors"}}'),
        "to names of files in this folder",
    ),
    "adapter config": (write("adapter_config.json", "{"), "adapter_config.json: cannot be read"),
}


@pytest.mark.parametrize("key", ["model.path", "init"])
@pytest.mark.parametrize("damage", MODELS)
def test_damaged_model_is_one_message(damage, key, options, tiny_folder, tmp_path):
    change, message = MODELS[damage]
    change(saved(tmp_path / "m"))
    check_error(message, *options, *SHORT, f"{key}={tmp_path}/m")


def test_damaged_adapter_is_one_message(options, tiny_folder, tmp_path):
    pytest.importorskip("peft")
    for name, content, message in (
        ("adapter_config.json", "{", "adapter_config.json: cannot be read"),
        ("adapter_model.safetensors", "", "adapter_model.safetensors: is damaged"),
    ):
        save_lora(tmp_path / name, tiny_folder)
        (tmp_path / name / name).write_text(content)
        check_error(message, *options, *SHORT, f"model.path={tmp_path}/{name}")
    save_lora(tmp_path / "rank", tiny_folder)
    file = tmp_path / "rank" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": "x"}))
    check_error("does not fit its base", *options, *SHORT, f"model.path={tmp_path}/rank")


def test_row_that_is_too_long_is_one_message(options, tmp_path, monkeypatch):
    """A tokenizer takes gigabytes for it, so it is not called."""
    monkeypatch.setattr("var.data.template.Template.tokenize", lambda *_: pytest.fail("the row was tokenized"))
    record = {"id": "long", "prompt": "x" * 3_000_000, "responses": ["y" * 2_000_000, "z"]}
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    message = "its texts have 5,000,009 characters, and a row may have 5,000,000; shorten or remove it (row long)"
    check_error(message, *options, *SHORT, f"data.path={tmp_path}/long.jsonl")


def test_damaged_summary_is_one_message(options, tmp_path):
    check_run("train.py", *options, *SHORT)
    path = run_folder(tmp_path / "runs") / "summary.json"
    complete = path.read_text()
    for content in (complete[:100], "[]", '{"reward": 1}', "", "\0", "[" * 100_000):
        path.write_text(content)
        assert "summary.json is damaged" in check_error("resume=false to start a new one", *options, *SHORT)
    path.write_bytes(b"\xff\xfe")
    check_error("summary.json is damaged", *options, *SHORT)


@pytest.mark.parametrize("content", ["step,a\nx,1\n", "a,b\n1,2\n", b"\xff\xfe\n1\n"])
def test_damaged_curves_are_one_message(content, options, tmp_path, monkeypatch):
    more = [*options, *SHORT, "trainer.checkpoint_every_n_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(AlignmentModule, "on_train_end", lambda *_: (_ for _ in ()).throw(SystemExit(143)))
        assert run("train.py", *more).returncode != 0
    path = run_folder(tmp_path / "runs") / "metrics.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_error("metrics.csv: is damaged", *more)


def test_checkpoint_of_another_form_is_one_message(options, tmp_path):
    """It holds plain values, so it is read, and some are missing or have other types."""
    check_run("train.py", *options, *SHORT, "trainer.keep_checkpoint=true")
    file = run_folder(tmp_path / "runs") / "checkpoints" / "last.ckpt"
    settings = torch.load(file, weights_only=True)["settings"]
    more = [*options, "trainer.max_steps=4", *SHORT[1:], f"resume={tmp_path}/x.ckpt"]
    for change, message in (
        ({"settings": "x"}, "settings is not of type dict"), ({"loops": "x"}, "loops is not of type dict"),
        ({"settings": {**settings, "config": [1]}}, "settings have another form"),
        ({"settings": {**settings, "history": [3]}}, "TypeError"),
        ({"global_step": "x"}, "global_step is not of type int"), ({"state_dict": 3}, "state_dict is not of type dict"),
        ({"callbacks": "x"}, "callbacks is not of type dict"), ({"AlignmentData": "x"}, "AlignmentData is not of type"),
    ):  # fmt: skip
        torch.save({**torch.load(file, weights_only=True), **change}, tmp_path / "x.ckpt")
        assert message in check_error("x.ckpt is not a checkpoint of a run", *more)
    content = torch.load(file, weights_only=True)
    del content["state_dict"]
    torch.save(content, tmp_path / "x.ckpt")
    check_error("state_dict is missing", *more)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_files_are_synced_before_what_marks_them_as_complete(options, tmp_path, monkeypatch):
    """A power loss can lose what is not synced, also after a later rename."""
    events, fsync, replace = list[tuple[str, str]](), os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        events.append(("sync", re.sub(r"\.[0-9a-f]{32}\.partial", "", os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        events.append(("rename", str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    check_run("train.py", *options, *SHORT, "trainer.checkpoint_every_n_steps=1", "trainer.keep_checkpoint=true")
    run = str(run_folder(tmp_path / "runs"))
    for first, marker in (
        ("/checkpoints/step-2.ckpt", "/checkpoints/step-2.ckpt"),
        ("/checkpoints/step-2.sha256", "/checkpoints/step-2.ckpt"),
        ("/model/model.safetensors", "/model"), ("/model", "/checkpoints/exported"),
        ("/metrics.csv", "/summary.json"), ("/model/config.yaml", "/summary.json"), ("/summary.json", "/summary.json"),
    ):  # fmt: skip
        at = events.index(("rename", run + marker))
        assert ("sync", run + first) in events[:at], (first, marker)
        assert ("sync", run + str(Path(marker).parent).rstrip("/")) in events[at:], marker


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("form", ["path", "message", "rust"])
def test_error_of_the_file_system_is_one_message(code, form, options, tmp_path, monkeypatch):
    """Python names the path, pyarrow has it in its message, and libraries in Rust have no number of their own."""
    from safetensors import SafetensorError

    error: Exception = {
        "path": OSError(code, os.strerror(code), f"{tmp_path}/run/plan.npz"),
        "message": OSError(code, f"Cannot open '{tmp_path}/run/plan.npz'. {os.strerror(code)}"),
        "rust": SafetensorError(f"I/O error: {os.strerror(code)} (os error {code}) {tmp_path}/run/plan.npz"),
    }[form]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AlignmentModule, "training_step", fail)
    assert "run/plan.npz" in check_error(os.strerror(code), *options, *SHORT)


def test_read_only_caches_that_hold_everything_are_used(options, tmp_path, monkeypatch):
    more = [*options, *SHORT, "loss=dpo"]
    check_run("train.py", *more)
    real = tempfile.TemporaryFile

    def read_only(dir: Path, **more: Any) -> Any:
        if Path(dir).is_relative_to(tmp_path / "store") or Path(dir).is_relative_to(tmp_path / "cache"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(dir=dir, **more)

    monkeypatch.setattr("var.utils.files.TemporaryFile", read_only)
    check_run("train.py", *more, f"runs={tmp_path}/other")
    printed = check_error("cannot be written: Read-only file system", *more, "model.chat_template=plain")
    assert f"annotation_cache={tmp_path}/store: it lacks " in printed
    (tmp_path / "store" / "empty").mkdir()
    check_error("folders that cannot be written (1)", *more, f"annotation_cache={tmp_path}/store/empty", "seed=1")


@pytest.mark.parametrize("name", ["../../../../escaped", "/escaped", "n" * 300])
def test_names_of_trackers_stay_in_the_folder_of_the_run(name, options, tmp_path):
    trackers = ["logger=tensorboard", f"logger.tensorboard.name={name}"]
    check_run("train.py", *options, *SHORT, *trackers, "seed=1")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert events.parents[1] == run_folder(tmp_path / "runs") / "tensorboard"
    wandb = ["logger=wandb", "logger.wandb.offline=true", f"logger.wandb.project={name}"]
    assert "logger.wandb: Invalid project name" in check_error("loggers (1)", *options, *SHORT, *wandb)


def test_run_folder_that_is_moved_while_training_is_one_message(options, tmp_path, monkeypatch):
    real = AlignmentModule.training_step

    def move(*arguments: Any) -> Any:
        folder = run_folder(tmp_path / "runs")
        if not (tmp_path / "moved").exists():
            shutil.move(folder, tmp_path / "moved")
            (tmp_path / "runs" / "other").mkdir()
        return real(*arguments)

    monkeypatch.setattr(AlignmentModule, "training_step", move)
    check_error("it was moved or removed", *options, *SHORT)
