"""`export.push_to_hub`: the model of a finished run on a local hub."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import check_error, write_rows, write_to
from tests.helpers.hub_server import TOKEN, Hub, client_environment, serve_hub
from tests.helpers.hub_uploads import Uploads
from tests.helpers.runs import ROOT, run_folder

pytestmark = pytest.mark.e2e


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve_hub(uploads=Uploads(tmp_path / "hub")) as server:
        yield server


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path) -> list[str]:
    rows = write_rows(tmp_path / "rows.jsonl", prompts=6)
    return [
        f"model.path={tiny_folder}", *write_to(tmp_path), "trainer.accelerator=cpu", "data=files", f"data.path={rows}",
        "reward=exact_number", "data.validation_prompts=2", "data.micro_batch=2", "data.global_batch=2", "eval=off",
        "trainer.max_steps=1", "loss=sft",
    ]  # fmt: skip


def run(hub: Hub, home: Path, script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = client_environment(hub, home, **{"HF_TOKEN": TOKEN, **more})
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_finished_model_is_pushed_and_loads_from_the_hub(hub: Hub, own: list[str], tmp_path: Path) -> None:
    uploads: Any = hub.uploads
    uploads.rejects = True
    done = run(hub, tmp_path / "home", "train.py", *own, "export.push_to_hub=me/tiny")
    assert done.returncode == 1
    assert "the run is complete, and its model was not pushed" in done.stderr
    assert uploads.private == {"me/tiny": True}
    uploads.rejects = False
    sent = tmp_path / "hub" / "me" / "tiny"
    for name in ("adapter_config.json", "model-00001-of-00002.safetensors", "notes.txt", ".gitattributes"):
        (sent / name).write_text("{}")  # as after a push of another model
    done = run(hub, tmp_path / "home", "train.py", *own, "export.push_to_hub=me/tiny")  # pushes the finished run
    assert done.returncode == 0, done.stderr
    assert "Run already finished" in done.stdout
    assert f"Pushed: {hub.url}/me/tiny" in done.stdout
    folder = run_folder(tmp_path / "runs") / "model"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept = {path.name: path.read_bytes() for path in sent.iterdir() if path.name != ".gitattributes"}
    assert kept == {**files, "notes.txt": b"{}"}  # transformers would load files of the earlier model
    places = write_to(tmp_path / "again")
    again = run(
        hub, tmp_path / "other", "train.py", "model=hub", "model.path=me/tiny", *places, *own[1 + len(places) :]
    )
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("tiny", {}, "expected owner/name"),
        ("other/tiny", {}, "the token belongs to me and can push to me, team. Use a token of other"),
        ("readers/tiny", {}, "can push to me, team. Use a token of readers"),
        ("me/tiny", {"HF_TOKEN": ""}, "no token is set"),
        ("me/tiny", {"HF_TOKEN": "hf_wrong"}, "did not confirm the token"),
        ("me/tiny", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_wrong_target_is_an_error_before_training(
    name: str, environment: dict[str, str], message: str, hub: Hub, own: list[str], tmp_path: Path
) -> None:
    done = run(hub, tmp_path / "home", "train.py", *own, f"export.push_to_hub={name}", **environment)
    assert done.returncode == 1
    assert message in done.stderr, done.stderr
    assert not list(tmp_path.glob("runs/*/metrics.csv"))


def test_adapter_of_a_model_in_a_folder_is_not_pushed_alone(hub: Hub, own: list[str], tmp_path: Path) -> None:
    """It names its base, which others do not have. It is an error before training, and of a finished run."""
    words = [*own, "adapter=lora", "adapter.merge=false"]
    done = run(hub, tmp_path / "home", "train.py", *words, "export.push_to_hub=me/tiny")
    assert done.returncode == 1
    assert "which only this machine has; set adapter.merge=true" in done.stderr
    assert not list((tmp_path / "runs").rglob("plan.npz"))
    assert run(hub, tmp_path / "home", "train.py", *words).returncode == 0
    done = run(hub, tmp_path / "home", "train.py", *words, "export.push_to_hub=me/tiny")
    assert "Run already finished" in done.stdout
    assert "which only this machine has; set adapter.merge=true" in done.stderr
    assert not (tmp_path / "hub" / "me").exists()


def test_token_that_only_reads_is_an_error_before_training(hub: Hub, own: list[str], tmp_path: Path) -> None:
    uploads: Any = hub.uploads
    uploads.role = "read"
    done = run(hub, tmp_path / "home", "train.py", *own, "export.push_to_hub=me/tiny")
    assert "the token can only read" in done.stderr, done.stderr
    assert not list(tmp_path.glob("runs/*/metrics.csv"))


def test_sweep_does_not_push(own: list[str]) -> None:
    check_error("Push one finished run", *own, "export.push_to_hub=me/tiny", "-m")
