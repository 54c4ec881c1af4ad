"""Say which option of each group a run uses, and what chose it: the command line or a file of conf/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from var.config.check import FOLDER

GROUPS = ("model", "data", "reward", "generate", "loss", "optim", "strategy")


def describe_choices() -> list[str]:
    """Return a line per group, such as `data: offsetbias (conf/train.yaml)`; nothing outside of a command."""
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    choices, words = hydra.runtime.choices, hydra.overrides.task
    folders = [Path(FOLDER)]
    folders += [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
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
