"""report.py --wandb: the view that a server of W&B's protocol is asked to save, and what is said when it is not."""

import json
from typing import Any

import pytest

from tests.e2e.test_commands import run
from tests.helpers.servers import Broken, served
from var.report.figures import JUDGED, MEMORY, PANELS

pytest.importorskip("wandb_workspaces", reason="needs wandb-workspaces: pip install -e '.[wandb-views]'")
KEY = {"WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}


def saved(reply: Any, *arguments: str, **variables: str) -> tuple[Any, list[dict[str, Any]]]:
    """report.py beside a server; the bodies with which it was asked to save a view."""

    def answer(body: dict[str, Any], before: int) -> Any:
        if "upsertView" in body["query"]:
            return reply
        viewer = {"id": "1", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": viewer, "serverInfo": {}}}

    with served(answer) as server:
        done = run("report.py", *arguments, **{**KEY, **variables}, WANDB_BASE_URL=server.base_url.removesuffix("/v1"))
    return done, [body["variables"] for body in server.bodies if "upsertView" in body["query"]]


def test_the_panels_of_a_report_are_saved_as_a_view_of_the_project() -> None:
    view = {"id": "x", "name": "nw-abc-v"}
    done, (asked,) = saved({"data": {"upsertView": {"view": view, "inserted": True}}}, "--wandb", "us/aligned")
    assert done.returncode == 0, done.stderr
    assert (asked["entityName"], asked["projectName"], asked["type"]) == ("us", "aligned", "project-view")
    assert "/us/aligned?nw=abc" in done.stdout
    section = json.loads(asked["spec"])["section"]
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    drawn = [metric for line in lines for metric in line["metrics"]]
    assert sorted(drawn) == sorted([*PANELS, JUDGED, MEMORY])
    assert {line["xAxis"] for line in lines} == {"trainer/global_step"}
    assert {line["groupArea"] for line in lines} == {"stderr"}
    (scatter,) = [panel["config"] for panel in panels if panel["viewType"] == "Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:validation/kl", "summary:validation/reward")
    assert [key["name"] for key in section["runSets"][0]["grouping"]] == ["group"]


@pytest.mark.parametrize(
    ("reply", "arguments", "told"),
    [
        (
            Broken(status=404, text='{"errors": [{"message": "project not found"}]}'),
            ["us/none"],
            "did not save the view",
        ),
        (None, ["aligned"], "entity/project is wanted"),
        (None, ["us/aligned/x"], "entity/project is wanted"),
    ],
)
def test_a_view_that_cannot_be_saved_is_one_line(reply: Any, arguments: list[str], told: str) -> None:
    done, _ = saved(reply, "--wandb", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: --wandb {arguments[0]}: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_view_needs_a_key() -> None:
    done, asked = saved(None, "--wandb", "us/aligned", WANDB_API_KEY="")
    assert (done.returncode, asked) == (1, [])
    assert "did not save the view (No API key configured" in done.stderr


def test_nothing_to_report_on_is_told() -> None:
    done = run("report.py")
    assert done.returncode == 2
    assert "name folders, or --wandb" in done.stderr
