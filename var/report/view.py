"""Save the panels of a report as a view of a Weights & Biases project: pip install -e '.[wandb-views]'."""

from typing import Any

from var.report.figures import JUDGE_WIN_RATE, PANELS, PEAK_MEMORY
from var.utils.errors import UserError, brief
from var.utils.extras import name_install

NAME = "VAR: training and validation"
STEP = "trainer/global_step"  # Lightning's logger counts optimizer steps under this name


def build_view(project: str) -> Any:
    """Return a view of "entity/project": curves with a band of one standard error, and reward against KL.

    The bands are over the runs of a group. `logger=wandb` puts runs that differ only in seeds into one group.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError:
        raise UserError(f"--wandb: wandb-workspaces is not installed. Run {name_install('wandb-views')}.") from None
    entity, _, name = project.partition("/")
    if not entity or not name or "/" in name:
        raise UserError(f"--wandb {project}: not of the form entity/project. Take it from the project's address.")

    def build_plot(metric: str, title: str) -> Any:
        y: list[Any] = [metric, JUDGE_WIN_RATE] if metric == "validation/win_rate" else [metric]
        return panels.LinePlot(title=title, x=STEP, y=y, aggregate=True, groupby_rangefunc="stderr")

    validation = [build_plot(metric, title) for metric, title in PANELS.items() if metric.startswith("validation/")]
    training = [build_plot(metric, title) for metric, title in PANELS.items() if not metric.startswith("validation/")]
    reward, kl = (panels.SummaryMetric(f"validation/{name}") for name in ("reward", "kl"))
    sections = {
        "Validation": [*validation, panels.ScatterPlot(title="reward against KL", x=kl, y=reward)],
        "Training": [*training, build_plot(PEAK_MEMORY, "peak memory, GiB")],
    }
    return workspaces.Workspace(
        entity=entity,
        project=name,
        name=NAME,
        sections=[workspaces.Section(name=title, panels=plots, is_open=True) for title, plots in sections.items()],
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")]),
    )


def save_view(project: str) -> str:
    """Save a new view of the project, and return its address."""
    view = build_view(project)
    try:
        view.save()
        return str(view.url)
    except Exception as error:  # the exceptions of W&B's client have no common type
        raise UserError(f"--wandb {project}: W&B did not save the view ({brief(error)})") from error
