"""Say which option of each group a run uses, and what chose it: the command line or a file of conf/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from var.config.check import FOLDER
from var.config.saved import to_saved

UNRELATED = ("architecture", "cache", "concurrency", "key", "repository", "retries", "timeout", "tokens")
GROUPS = ("model", "data", "reward", "generate", "loss", "optim", "strategy")


def name_part(cfg: DictConfig, group: str) -> str:
    """Return the name of a group's option, or of the class that runs if `_target_` replaced the option's own."""
    target, choice = str(cfg[group]._target_), HydraConfig.get().runtime.choices.get(group)
    if choice is not None and target in find_targets(list_folders(), f"{group}/{choice}"):
        return choice
    return target.rpartition(".")[2]


def describe_part(node: Any) -> Any:
    """Return a part of the configuration without settings that its result does not depend on, as plain values."""
    node = to_saved(node)
    if isinstance(node, dict):
        return {key: describe_part(value) for key, value in node.items() if key not in UNRELATED}
    return node


def describe_choices() -> list[str]:
    """Return a line per group, such as `data: offsetbias (conf/train.yaml)`; nothing outside of a command."""
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    choices, words = hydra.runtime.choices, hydra.overrides.task
    folders = list_folders()
    lines = []
    for group in GROUPS:
        if (choice := choices.get(group)) is None:
            continue
        if any(word.lstrip("+").startswith(f"{group}=") for word in words):
            source = "command line"
        else:
            # Hydra lets the last entry of a defaults list override first: an experiment, then the model, then the data.
            names = [f"{place}/{choices.get(place)}" for place in ("experiment", "model", "data") if choices.get(place)]
            found = (file for name in names for file in find_override(folders, name, group, choice))
            source = f"conf/{next(found, hydra.job.config_name)}.yaml"
        lines.append(f"{group}: {choice} ({source})")
    return lines


def find_override(folders: list[Path], name: str, group: str, choice: str) -> Iterator[str]:
    """Yield the names of the files, `name` and its bases, that override `group` with `choice`."""
    for folder in folders:
        if not (file := folder / f"{name}.yaml").exists():
            continue
        content = OmegaConf.load(file)
        entries: Any = content.get("defaults", []) if isinstance(content, DictConfig) else []
        for entry in entries:
            if isinstance(entry, DictConfig):
                ((place, option),) = entry.items()
                key = str(place).partition("@")[0].split()
                if key[0] == "override" and key[-1].strip("/") == group and option == choice:
                    yield name
            elif entry != "_self_":
                yield from find_override(folders, f"{name.rpartition('/')[0]}/{entry}", group, choice)
        return


def list_folders() -> list[Path]:
    """Return the folders of the configuration: conf/, and those of the command line."""
    sources = HydraConfig.get().runtime.config_sources
    return [Path(FOLDER), *(Path(source.path) for source in sources if source.schema == "file")]


def find_targets(folders: list[Path], name: str) -> Iterator[str]:
    """Yield the classes that the files `name`, and their bases, set by `_target_`."""
    for folder in folders:
        if not (file := folder / f"{name}.yaml").exists():
            continue
        content = OmegaConf.load(file)
        if isinstance(content, DictConfig) and "_target_" in content and not OmegaConf.is_missing(content, "_target_"):
            yield str(content._target_)
        entries: Any = content.get("defaults", []) if isinstance(content, DictConfig) else []
        for entry in entries:
            if isinstance(entry, str) and entry != "_self_":
                yield from find_targets(folders, f"{name.rpartition('/')[0]}/{entry}")
