"""The report's panels as a saved view of a Weights & Biases project: pip install -e '.[wandb-views]'."""

from typing import Any

from var.report.figures import JUDGED, MEMORY, PANELS
from var.utils.errors import UserError, brief

NAME = "VAR: training, held-out answers"
STEP = "trainer/global_step"  # Lightning's logger counts optimiser steps under this name


def view(project: str) -> Any:
    """Of "entity/project": curves with a band of one standard error over the runs of a group, and reward against KL.

    Runs that differ in seeds alone are a group: `logger=wandb` names it by the configuration.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError:
        raise UserError("--wandb: an extra: pip install -e '.[wandb-views]'") from None
    entity, _, name = project.partition("/")
    if not entity or not name or "/" in name:
        raise UserError(f"--wandb {project}: entity/project is wanted, as in the project's address")

    def curve(metric: str, title: str) -> Any:
        y: list[Any] = [metric, JUDGED] if metric == "validation/win_rate" else [metric]
        return panels.LinePlot(title=title, x=STEP, y=y, aggregate=True, groupby_rangefunc="stderr")

    training = [curve(metric, title) for metric, title in PANELS.items() if not metric.startswith("validation/")]
    held_out = [curve(metric, title) for metric, title in PANELS.items() if metric.startswith("validation/")]
    reward, kl = (panels.SummaryMetric(f"validation/{name}") for name in ("reward", "kl"))
    sections = {
        "Held-out answers": [*held_out, panels.ScatterPlot(title="reward against KL", x=kl, y=reward)],
        "Training": [*training, curve(MEMORY, "peak memory, GiB")],
    }
    return workspaces.Workspace(
        entity=entity,
        project=name,
        name=NAME,
        sections=[workspaces.Section(name=title, panels=of, is_open=True) for title, of in sections.items()],
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")]),
    )


def save(project: str) -> str:
    """A new view of the project each time; returns its address."""
    made = view(project)
    try:
        made.save()
        return str(made.url)
    except Exception as error:  # what W&B's client raises has no type in common
        raise UserError(f"--wandb {project}: W&B did not save the view ({brief(error)})") from error
