"""Checks of eval.py's configuration before anything is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from var.config.changes import compare
from var.config.run_files import read_json
from var.config.saved import to_saved
from var.models.pretrained import Pretrained
from var.utils.console import say, warn
from var.utils.errors import Problems


def warn_of_other_reference(model: Pretrained, reference: Pretrained) -> None:
    """Warn if a run's model is compared with another model than the one that the run started from."""
    try:
        started = read_json(Path(model.path).parent / "summary.json")["hashes"]["weights"]
    except (OSError, ValueError, LookupError, TypeError):  # not a run's folder, or an unfinished one
        return
    if started != reference.weights:
        warn(
            f"reference=auto: {Path(model.path).parent} did not start from {reference.path}, with which its model is "
            "compared. Set model and model.path to what it started from, or reference to another model or null."
        )


def say_differences(cfg: DictConfig, trained: Mapping[str, Any]) -> None:
    """Print the settings of prompts, reward and sampling that differ from those of the run's own evaluation.

    trained: the run's configuration, which may lack any part.
    """
    own, validation = to_saved(cfg), trained.get("eval")
    validation = validation if isinstance(validation, dict) else {}
    before = {
        "data.source": trained["data"].get("source"),
        "reward": validation.get("reward") or trained.get("reward"),
        **_list_sampling(validation.get("sampling")),
    }
    after = {"data.source": own["data"]["source"], "reward": own["reward"], **_list_sampling(own["generate"])}
    has_both = [key for key in before if before[key] is not None and after.get(key) is not None]
    different = [str(change) for key in has_both for change in compare(key, before[key], after[key])]
    if different:
        say(f"Not as in the run's own evaluation: {', '.join(different)}")


def _list_sampling(sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    return {f"generate.{key}": (sampling or {}).get(key) for key in ("temperature", "top_p", "max_new_tokens")}


def check_settings(cfg: DictConfig) -> None:
    """Raise one UserError for all values that have the right type and cannot be used."""
    more = list(cfg.more.values()) if isinstance(cfg.more, DictConfig) else [None]
    averages = list(cfg.averages.values()) if isinstance(cfg.averages, DictConfig) else [None]
    has_sets = all(isinstance(part, DictConfig) for part in more)
    names = [part.name for part in (cfg.data, *more)] if has_sets else []
    unknown = sorted(set(cfg.held_out) - set(names)) if isinstance(cfg.held_out, ListConfig) else []
    seeds, sampling = list(cfg.seeds), cfg.generate
    checks = [
        *((key, cfg[key] is None or cfg[key] >= 1, f"expected at least 1, or null for all, got {cfg[key]}")
          for key in ("prompts", "judged")),
        *((key, cfg[key] != "", f"is empty (unset shell variable?). Use {key}=null for none.")
          for key in ("init", "answers", "reference")),
        ("seed", cfg.seed >= 0, f"expected at least 0, got {cfg.seed}"),
        ("seeds", all(seed >= 0 for seed in seeds), f"expected numbers of at least 0, got {seeds}"),
        ("seeds", seeds and len(set(seeds)) == len(seeds), f"expected one or more different numbers, got {seeds}"),
        ("seeds", sampling.temperature != 0 or len(seeds) < 2 or cfg.answers,
         "at temperature 0 all seeds give the same answers. Set seeds=[0]."),
        ("generate.seed", sampling.seed == cfg.seed, "has no effect here. Set seeds."),
        ("generate.responses", sampling.responses == 1,
         "one answer is sampled per prompt and seed. Leave it at 1 and set seeds."),
        ("more", has_sets, f"expected data sets by name, as from +data@more.bias=offsetbias, got {cfg.more!r}"),
        ("more", len(set(names)) == len(names), f"data sets must have different names, got {names}. Set more.….name."),
        ("held_out", not unknown or not has_sets, f"there is no data set {unknown}; the data sets are {names}"),
        ("averages", all(isinstance(part, ListConfig) for part in averages),
         f"expected lists of subsets by name, got {cfg.averages}"),
        ("init", not (cfg.answers and cfg.init), "has no effect with answers=, a file in place of a model's answers"),
        ("reward", cfg.reward or not cfg.second_reward, "none is set, but second_reward is. Set reward to it"),
        ("benchmarks", not (cfg.answers and cfg.benchmarks), "need a model, but answers= is a file. Remove one"),
    ]  # fmt: skip
    problems = Problems("the configuration cannot be used")
    for key, valid, problem in checks:
        if not valid:
            problems.add(key, problem)
    problems.check()
