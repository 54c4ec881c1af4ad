"""The check for a GPU runs through at tiny sizes, and a check that fails is a finding."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.runs import ROOT

FOLDER = ROOT / "experiments" / "gpu"


@pytest.fixture
def findings() -> ModuleType:
    """Import findings.py, which is a script."""
    spec = importlib.util.spec_from_file_location("gpu_findings", FOLDER / "findings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]


def test_failing_check_is_a_finding_and_the_next_one_runs(
    findings: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(found: object, item: str) -> None:
        raise RuntimeError("no kernel\nimage")

    def works(found: object, item: str, value: float) -> None:
        found.add(item, "speed", value, "times", "at most 1.2", value <= 1.2)  # type: ignore[attr-defined]

    found = findings.Findings(tmp_path)
    found.run(fails, "a fault")
    found.run(works, "another fault", 1.0)
    one, two = read(tmp_path)
    assert one == {
        "name": "fails raised an error", "value": "RuntimeError: no kernel image", "unit": "", "expected": "no error",
        "ok": False, "item": "a fault",
    }  # fmt: skip
    assert (two["ok"], two["value"], two["item"]) == (True, 1.0, "another fault")
    assert findings.main(tmp_path) == 1
    assert "1 of 2 are not as expected" in capsys.readouterr().out


@pytest.mark.parametrize(("values", "status"), [([], 1), ([True, None], 0), ([True, False], 1)])
def test_exit_status_says_whether_all_is_as_expected(
    findings: ModuleType, tmp_path: Path, values: list[bool | None], status: int
) -> None:
    for ok in values:
        findings.Findings(tmp_path).add("a fault", "name", float("nan"), "s", "at most 1", ok)
    assert findings.main(tmp_path) == status


@pytest.mark.long
def test_check_runs_through_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "DRY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(FOLDER / "check.sh"), str(tmp_path)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path)
    assert all(finding.keys() == {"name", "value", "unit", "expected", "ok", "item"} for finding in found)
    names = {finding["name"] for finding in found}
    for name in (
        "dtypes of q, k, v", "head over layers, forward and backward", "synchronizations per 16 sampled tokens",
        "gpu tests", "DPO, packed: finishes", "DPO, packed without cuDNN: finishes", "KTO: finishes", "GRPO: finishes",
        "SFT step: speed",
    ):  # fmt: skip
        assert name in names
    assert not [finding for finding in found if finding["ok"] is False]
