"""Test report.py --wandb against a server that speaks the protocol of Weights & Biases."""

import json
import re
from typing import Any

import pytest

from tests.helpers.cli import run, spawn
from tests.helpers.runs import ROOT
from tests.helpers.servers import Broken, served
from var.report.figures import JUDGE_WIN_RATE, PANELS, PEAK_MEMORY

pytest.importorskip("wandb_workspaces", reason="needs wandb-workspaces: pip install -e '.[wandb-views]'")
KEY = {"WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}


def save_view(reply: Any, *arguments: str, **variables: str) -> tuple[Any, list[dict[str, Any]]]:
    """Run report.py against a server, and return the requests to save a view."""

    def answer(body: dict[str, Any], before: int) -> Any:
        if "upsertView" in body["query"]:
            return reply
        viewer = {"id": "1", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": viewer, "serverInfo": {}}}

    with served(answer) as server:
        done = run("report.py", *arguments, **{**KEY, **variables}, WANDB_BASE_URL=server.base_url.removesuffix("/v1"))
    return done, [body["variables"] for body in server.bodies if "upsertView" in body["query"]]


def test_panels_are_saved_as_a_view() -> None:
    view = {"id": "x", "name": "nw-abc-v"}
    done, (request,) = save_view({"data": {"upsertView": {"view": view, "inserted": True}}}, "--wandb", "us/aligned")
    assert done.returncode == 0, done.stderr
    assert (request["entityName"], request["projectName"], request["type"]) == ("us", "aligned", "project-view")
    assert "/us/aligned?nw=abc" in done.stdout
    section = json.loads(request["spec"])["section"]
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    drawn = [metric for line in lines for metric in line["metrics"]]
    assert sorted(drawn) == sorted([*PANELS, JUDGE_WIN_RATE, PEAK_MEMORY])
    assert {line["xAxis"] for line in lines} == {"trainer/global_step"}
    assert {line["groupArea"] for line in lines} == {"stderr"}
    (scatter,) = [panel["config"] for panel in panels if panel["viewType"] == "Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:validation/kl", "summary:validation/reward")
    assert [key["name"] for key in section["runSets"][0]["grouping"]] == ["group"]


@pytest.mark.parametrize(
    ("reply", "project", "message"),
    [
        (
            Broken(status=404, text='{"errors": [{"message": "project not found"}]}'),
            "us/none",
            "did not save the view",
        ),
        (None, "aligned", "not of the form entity/project"),
        (None, "us/aligned/x", "not of the form entity/project"),
    ],
)
def test_failure_to_save_a_view_is_one_line(reply: Any, project: str, message: str) -> None:
    done, _ = save_view(reply, "--wandb", project)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: --wandb {project}: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_view_needs_an_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: wandb 0.21 remembers the key of an earlier test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    process = spawn(str(ROOT / "report.py"), "--wandb", "us/aligned")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert re.search(r"did not save the view \((No API key|api_key not) configured", errors)  # by wandb's version


def test_report_needs_folders_or_a_project() -> None:
    done = run("report.py")
    assert done.returncode == 2
    assert "Give folders, or --wandb" in done.stderr
