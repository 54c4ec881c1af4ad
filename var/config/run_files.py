"""Read files of run and model folders that may come from a stranger: as plain values, with bounds on their size.

Nothing in them is resolved or built: `${oc.env:NAME}` stays text, and an alias of YAML, which can be nested to exhaust
the memory, is an error.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from var.utils.errors import UserError, brief
from var.utils.plain_yaml import check_aliases

MIB = 2**20
YAML_LIMIT, JSON_LIMIT, TABLE_LIMIT = MIB, 16 * MIB, 1024 * MIB  # bytes of config.yaml, summary.json, metrics.csv


def check_size(path: Path, limit: int) -> Path:
    """Return the path. Raise OSError if it is not a file, and ValueError if it is larger than `limit` bytes."""
    if not path.is_file():  # reading a pipe would wait forever
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path.name} has {size / MIB:.0f} MiB, more than the limit of {limit / MIB:.0f} MiB")
    return path


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raise OSError or ValueError if it cannot be read."""
    try:
        return json.loads(check_size(path, JSON_LIMIT).read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file such as config.json. Raise UserError if it is damaged or not a mapping."""
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({brief(error)}). Restore this file.") from error
    return found


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as plain values. Raise OSError or ValueError if it cannot be read."""
    try:
        text = check_aliases(check_size(path, YAML_LIMIT).read_text())
        return OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError) as error:  # the last: of text that is a scalar
        raise ValueError(f"{path.name} is not YAML of plain values: {' '.join(str(error).split())[:200]}") from error


def read_run_config(model: Path) -> dict[str, Any]:
    """Return the configuration that a run wrote next to its exported model; empty if there is none.

    Its parts `model` and `data` are mappings. Raise UserError if it cannot be read.
    """
    path = model / "config.yaml"
    try:
        found = read_yaml(path) if path.exists() else {}
        parts = {name: found.get(name) or {} for name in ("model", "data")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError("model and data must be mappings")
        if not isinstance(found.get("init"), str | None):
            raise ValueError(f"init must be a path, got {found['init']}")
        if not isinstance(arguments := parts["model"].get("chat_template_kwargs"), dict | None):
            raise ValueError(f"chat_template_kwargs must be a mapping, got {arguments}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({brief(error)}). Restore it, or remove it.") from error
    return {**found, **parts}


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run. Raise UserError if it cannot be read."""
    path = folder / "summary.json"
    try:
        summary: dict[str, Any] = read_json(path)
        summary["config"], summary["folder"], summary["hashes"]["weights"], summary["reward"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {brief(error)}). Remove it and run the same command again to "
            "finish the run, or use resume=false to start a new one."
        ) from error
    return summary
