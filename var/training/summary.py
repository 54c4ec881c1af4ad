"""summary.json and the closing table of a run. `report.py` makes tables and figures of many runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from var.config.changes import list_changes
from var.config.entry import name_command
from var.config.saved import to_saved
from var.report.conclusion import conclude
from var.report.warnings import validation_warnings
from var.training.checks import locate_initial_model
from var.utils.console import say, warn
from var.utils.console import show as print_table
from var.utils.errors import Problems, UserError
from var.utils.statistics import Estimate


def show(summary: dict[str, Any]) -> None:
    """Print the closing table. It has only what applies to this run, results first."""
    table = Table(title=summary["title"], title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, before, after in [*results(summary["validation"]), *((name, "", text) for name, text in facts(summary))]:
        table.add_row(name, before, after)
    print_table(table)
    if sentence := conclude(summary["validation"]):
        say(sentence)
    folder, here = Path(summary["folder"]), Path.cwd()
    say(f"Run: {folder.relative_to(here) if folder.is_relative_to(here) else folder}")
    for text in validation_warnings(summary["validation"]):
        warn(text)


def results(validation: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, before, after) of the validation results."""

    def both(name: str, digits: int = 3) -> tuple[str, str]:
        before, after = (Estimate.from_json(validation[name][when]) for when in ("before", "after"))
        return f"{before:.{digits}f}", f"{after:.{digits}f}"

    if "accuracy" in validation:
        yield "accuracy on validation pairs", *both("accuracy")
    elif validation:
        if validation["reward"]["after"]:
            yield "validation reward", *both("reward")
            yield "gain, paired by prompt", "", str(Estimate.from_json(validation["reward"]["gain"]))
            win_rate = Estimate.from_json(validation.get("win_rate"))
            yield "win rate against the initial policy, by reward", "", str(win_rate)
        if judge := validation.get("judge"):
            rate = {"mean": judge["win_rate"], "se": judge["se_prompts"]}
            yield "win rate against the initial policy, by judge", "", str(Estimate.from_json(rate).scale(0.01))
        yield "response length, tokens", *both("length", 1)
        truncated = validation["truncated"]
        yield "truncated responses", f"{truncated['before']:.0%}", f"{truncated['after']:.0%}"
        yield "KL from the reference, nats", "0", str(Estimate.from_json(validation["kl"]))


def facts(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of what the run did."""
    data = summary["data"]
    yield "optimizer steps", str(summary["steps"])
    if summary.get("skipped_steps"):
        yield "steps skipped, not finite", str(summary["skipped_steps"])
    if summary["tokens_per_second"]:  # a resumed run may have no step left
        yield "tokens per second", f"{summary['tokens_per_second']:.0f}"
    if summary["ess"] is not None:
        yield "effective sample size of the weights, fraction", f"{summary['ess']:.2f}"
    if "zero_variance_groups" in data and (summary["ess"] is not None or "advantages" not in data):
        yield "zero-variance groups", f"{data['zero_variance_groups']} of {data['groups']}"
    seconds = summary["seconds"]
    digits = 0 if sum(seconds.values()) > 10 else 1
    yield "annotation, training, evaluation", " + ".join(f"{time:.{digits}f} s" for time in seconds.values())
    if earlier := summary.get("seconds_of_earlier_attempts"):
        yield "annotation and training before it was resumed", f"{earlier:.{digits}f} s"
    stages = {name.lower(): time for name, time in summary.get("seconds_of_stages", {}).items() if time >= 0.5}
    for name, time in sorted(stages.items(), key=lambda item: -item[1]):
        yield f"  of which {name}", f"{time:.0f} s, {time / sum(seconds.values()):.0%}"


def check_same_settings(cfg: DictConfig, finished: dict[str, Any]) -> None:
    """Raise UserError if a finished run had other settings. Only a folder that the user names can hold such a run."""
    problems = Problems(f"{finished['folder']} holds a finished run with other settings")
    for change in list_changes(finished["config"], to_saved(cfg)):
        if change.key.partition(".")[0] not in ("eval", "strategy"):  # the first has a message, the second is resolved
            problems.add(change.key, change.show_values())
    problems.check(
        "Choose another folder, set resume=false to replace the run, or, if it kept its checkpoint, continue from it "
        "with resume=<folder>/checkpoints/last.ckpt."
    )


def warn_of_other_evaluation(cfg: DictConfig, finished: dict[str, Any]) -> None:
    """Print how to evaluate a finished run if its evaluation had other settings, which do not name its folder."""
    before, now = {"enabled": True, **(finished["config"].get("eval") or {})}, to_saved(cfg.eval)
    if changed := [f"eval.{name}={now[name]}" for name in now if name in before and now[name] != before[name]]:
        say(
            f"This run was finished with other evaluation settings than {', '.join(changed)}. Evaluate its model with: "
            f"{' '.join(name_command('eval'))} init={finished['folder']}"
        )


def warn_of_newer_data(cfg: DictConfig, folder: Path) -> None:
    """Warn if data files are newer than a finished run. A run's folder is named by its configuration, not its data."""
    try:
        files = instantiate(cfg.data.source).fingerprint().get("files", [])
    except UserError:  # the data or its hub is not available; the run is finished all the same
        return
    finished = (folder / "summary.json").stat().st_ctime_ns
    if newer := [path for path, *_, written in files if written > finished]:
        warn(f"{', '.join(newer)} changed after this run finished. Use resume=false to train on the current data.")


def warn_of_other_weights(cfg: DictConfig, finished: dict[str, Any]) -> None:
    """Warn if the folder of the initial model has other weights than those that a finished run started from."""
    try:
        weights = locate_initial_model(cfg).weights
    except (UserError, OSError):  # the model or its hub is not available; the run is finished all the same
        return
    if weights != finished["hashes"]["weights"]:
        place = f"init={cfg.init}" if cfg.init else f"model.path={cfg.model.path}"
        warn(f"{place} has other weights than when this run started. Use resume=false to train from the present ones.")
