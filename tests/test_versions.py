"""Versions outside the bounds of pyproject.toml are reported in one line, and heavy packages load only where used."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from var.config import versions
from var.config.versions import check_versions
from var.utils.errors import UserError


def install(folder: Path, name: str, version: str) -> None:
    """Write the metadata of a package, which importlib.metadata finds if the folder is on the path."""
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def test_command_with_an_old_package_prints_one_line(tmp_path: Path) -> None:
    install(tmp_path, "torch", "2.10.0")
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    error = "Error: torch: version 2.10.0 is installed, but torch>=2.11 is needed. Run: pip install 'torch>=2.11'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error)


def test_all_packages_outside_the_bounds_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("torch", "2.9.1+cu128"), ("transformers", "5.9.0"), ("numpy", "2.0.2")):
        install(tmp_path, name, version)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        check_versions()
    assert str(error.value) == (
        "torch: version 2.9.1+cu128 is installed, but torch>=2.11 is needed. "
        "transformers: version 5.9.0 is installed, but transformers>=5.10.1 is needed. "
        "Run: pip install 'torch>=2.11' 'transformers>=5.10.1'"
    )


@pytest.mark.parametrize("command", ["train.py", "annotate.py", "eval.py", "sample.py", "report.py"])
def test_command_in_an_environment_without_packages_prints_one_line(command: str) -> None:
    """-S hides all installed packages."""
    done = subprocess.run([sys.executable, "-S", command], cwd=ROOT, capture_output=True, text=True)
    error = f"Error: hydra, omegaconf, packaging: not installed. Run: pip install -e {ROOT}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error)


def test_missing_packages_are_reported_with_the_folder_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout that was never installed."""
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError) as error:
        check_versions()
    assert re.fullmatch(
        rf"torch, lightning, .*, safetensors: not installed\. Run: pip install -e {re.escape(str(ROOT))}",
        str(error.value),
    )


@pytest.mark.parametrize("build", ["2.11.0a0+5228986c39.nv26.02", "2.11.0+cpu", "2.15.0", "3.0.0.dev20270101+cu140"])
def test_builds_of_later_or_equal_releases_are_accepted(
    build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "torch", build)
    monkeypatch.syspath_prepend(tmp_path)
    check_versions()


def test_every_dependency_has_a_lower_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/versions.sh installs the bounds, so a requirement without one would be tested with the newest alone."""
    lines = versions.PYPROJECT.read_text().split("dependencies = [")[1].split("]")[0].split('"')[1::2]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[\w-]+>=[\d.]+", line)] == []


def test_packages_for_one_feature_are_not_imported_at_the_start() -> None:
    program = "import sys, var.training.run, var.evaluate.run; print(*{'wandb', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
