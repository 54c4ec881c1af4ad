"""The package without its repository: the wheel has the configurations and the commands."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.cli import write_rows, write_to
from tests.helpers.runs import ROOT, run_folder

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the files that it needs, so that nothing is left in the repository."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("conf", "var", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", out, source]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = out.iterdir()
    return found


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", tmp_path / "site", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    return tmp_path / "site"


def run(installed: Path, name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(installed / "bin" / f"var-{name}"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_wheel_has_every_configuration_and_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [f"var/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")]
    wanted += [str(path.relative_to(ROOT)) for path in (ROOT / "var").rglob("*.py")]
    wanted += ["var/py.typed", "var/report/page.html.jinja"]
    assert [name for name in wanted if name not in names] == []
    assert {name.partition("/")[0] for name in names} == {
        "var",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


def test_messages_name_the_package_of_the_index(installed: Path, tmp_path: Path) -> None:
    code = "from var.utils.extras import name_install; print(name_install('vllm'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "pip install 'var-align[vllm]'\n", done.stderr


def test_commands_work_without_the_repository(installed: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """A sweep with a configuration of the user's own, from another folder, and a report of it."""
    (work := tmp_path / "work").mkdir()
    printed = run(installed, "train", "--help", cwd=work).stdout
    assert "var-train loss=sft" in printed
    assert "python train.py" not in printed
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "gentle.yaml").write_text("defaults: [var_grouped]\ntemperature: 2.0\n")
    rows = write_rows(work / "rows.jsonl", prompts=8)
    own = [
        f"--config-dir={tmp_path / 'mine'}", f"model.path={tiny_folder}", *write_to(work), "trainer.accelerator=cpu",
        "data=files", f"data.path={rows}",
        "reward=exact_number", "data.validation_prompts=2", "data.micro_batch=1", "data.global_batch=2", "eval=off",
        "trainer.max_steps=1",
    ]  # fmt: skip
    wrong = run(installed, "train", *own, "loss=gentel", cwd=work)
    assert wrong.returncode == 1
    assert "Did you mean loss=gentle?" in wrong.stderr
    missing = run(installed, "train", *own, "loss=gentle", "annotate=error", cwd=work)
    assert "Compute them once with: var-annotate " in missing.stderr, missing.stderr
    done = run(installed, "train", *own, "loss=gentle", "trainer.devices=2", "strategy=ddp", "-m", cwd=work)
    assert done.returncode == 0, done.stderr
    folder = run_folder(work / "runs")
    assert (folder / "model" / "model.safetensors").exists()
    done = run(installed, "report", str(folder), "--out", str(work / "report"), cwd=work)
    assert done.returncode == 0, done.stderr
    assert (work / "report" / "report.md").exists()
