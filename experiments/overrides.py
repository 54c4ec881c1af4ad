"""Which overrides of the command line go to which command, and whether all commands compose, before the first runs."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.items.base import Command
from var.config.check import EVAL, FOLDER, TRAIN, check
from var.utils.errors import UserError

Stage = tuple[str, Command]
"""The name of a stage, and its command."""
ROOTS = {"train.py": "train", "eval.py": "eval", "sample.py": "sample", "experiments/figure4/run.py": "train"}
PLACEHOLDER = re.compile(r"\{[^{}]+\}")


def route(stages: Sequence[Stage], overrides: Sequence[str], dry: bool = False) -> dict[Stage, list[str]]:
    """Return the overrides of each command.

    An override goes to all commands whose configuration takes it, or with `<stage>:` before it to that stage.

    dry: whether nothing will run, so that missing values are not an error.

    Raises:
        SystemExit: if a command does not compose, lacks a value, or an override goes to none; all problems at once.
    """
    problems, taken, routed = list[str](), set[str](), dict[Stage, list[str]]()
    names = {name for name, _ in stages}
    for stage in stages:
        name, command = stage
        routed[stage] = []
        if (root := ROOTS.get(command.program[0])) is None:
            continue
        own = [word.partition(":")[2] for word in overrides if word.split(":")[0] == name]
        general = [word for word in overrides if word.split(":")[0] not in names]
        try:
            cfg = compose_command(root, command, ())
            general = [word for word in general if _has_key(cfg, word)]
            routed[stage] = [*general, *own]
            taken.update(general, (f"{name}:{word}" for word in own))
            if routed[stage]:
                cfg = compose_command(root, command, routed[stage])
        except (HydraException, OmegaConfBaseException, UserError) as error:
            problems.append(f"{name}: {str(error).strip().splitlines()[0]}")
            continue
        if dry:
            continue
        missing = [f"{key}= is needed" for key in find_missing(cfg)]
        problems += missing
        if not missing and root in ("train", "eval"):
            try:
                check(cfg, TRAIN if root == "train" else EVAL, imports=False)
            except UserError as error:
                problems.append(f"{name}: {error}")
    problems += [f"{word}: no command has this key" for word in overrides if word not in taken]
    if problems:
        raise SystemExit("\n".join(dict.fromkeys(problems)))
    return routed


def find_missing(cfg: DictConfig) -> list[str]:
    """Return the keys that have no value."""

    def walk(part: Any, path: str) -> Iterator[str]:
        for key, value in part.items():
            if isinstance(value, dict):
                yield from walk(value, f"{path}{key}.")
            elif value == "???":
                yield f"{path}{key}"

    return sorted(walk(OmegaConf.to_container(cfg, resolve=False), ""))


def compose_command(root: str, command: Command, more: Sequence[str]) -> DictConfig:
    """Return the configuration of a command with further overrides; x is in place of what other commands make."""
    keys = {word.partition("=")[0] for word in more}
    words = [word for word in command.words if "=" in word or word.startswith("~")]
    words = [word.replace("{seed}", "0") for word in words if word.partition("=")[0] not in keys]
    words = [PLACEHOLDER.sub("x", word) for word in words]
    with initialize_config_dir(FOLDER, version_base="1.3"):
        return compose(root, [*words, *more])


def _has_key(cfg: DictConfig, word: str) -> bool:
    """Return whether an override changes a value of a configuration, adds to it, or selects one of its groups."""
    key = word.lstrip("+~").partition("=")[0].partition("@")[0]
    part = OmegaConf.to_container(cfg, resolve=False)
    path = key.split("/")[-1:] if "/" in key else key.split(".")
    for i, name in enumerate(path):
        if not isinstance(part, dict) or name not in part:
            return word.startswith("+") and i > 0
        part = part[name]
    return True
