"""The notebooks run: the code cells of each are executed in order in one namespace, and the results are checked."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest

from tests.helpers.cli import run
from tests.helpers.runs import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read_cells(name: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return cells


@pytest.fixture
def namespace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Return the namespace after the last cell. train.py runs in this process, to save its imports."""

    def run_here(command: list[str], cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        monkeypatch.syspath_prepend(env["PYTHONPATH"])
        with contextlib.chdir(cwd):
            return run(Path(command[1]).name, *command[2:])

    matplotlib.use("Agg")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(FOLDER)
    import tiny

    monkeypatch.setattr(tiny, "subprocess", SimpleNamespace(run=run_here))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(read_cells(request.param)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{request.param}, cell {number}", "exec"), names)
    yield names
    matplotlib.pyplot.close("all")


def test_every_notebook_has_a_test_below() -> None:
    assert NOTEBOOKS == ["bring_your_own", "exact_testbed", "read_a_run"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_complete_and_small(name: str) -> None:
    """Every code cell that prints has an output and no error, and the notebook is below 120 kB."""
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 120_000
    for cell in read_cells(name):
        if cell["cell_type"] == "code" and "print(" in "".join(cell["source"]):
            assert cell["outputs"]
            assert all(output["output_type"] != "error" for output in cell["outputs"])


@pytest.mark.parametrize("namespace", ["read_a_run"], indirect=True)
def test_read_a_run(namespace: dict[str, Any]) -> None:
    losses = namespace["curve"]("train/loss")[1]
    assert losses[-1] < 0.75 * losses[0]
    assert len(namespace["samples"]) == 4


@pytest.mark.parametrize("namespace", ["exact_testbed"], indirect=True)
def test_exact_testbed(namespace: dict[str, Any]) -> None:
    """The claims of its text hold: who reaches π*, who stops short of it, and that nothing lies above the frontier."""
    distance, ends = namespace["distance"], namespace["ends"]
    assert distance["exact"] < 1e-9 > distance["global"]
    assert distance["sampled"] < 1e-9
    assert distance["grouped"] < 0.05
    assert distance["grouped"] < distance["in_batch mean"] < distance["in_batch sum"]
    assert all(end["regret"] > -1e-6 for end in ends.values())
    assert max(ends[name]["kl_optimum_policy"] for name in ("infonca, β = 1", "rloo", "var_global")) < 0.025
    assert min(ends[name]["kl_optimum_policy"] for name in ("var", "var_grouped", "grpo")) > 0.04


@pytest.mark.parametrize("namespace", ["bring_your_own"], indirect=True)
def test_bring_your_own(namespace: dict[str, Any]) -> None:
    """The gradient is the one that its text derives, and the run uses the three custom parts."""
    assert namespace["logps"].grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0])
    assert namespace["folder"].name.startswith("tiny_rooms_above_average-")
    assert namespace["summary"]["validation"]["reward"]["after"]["mean"] > 0
