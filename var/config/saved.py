"""Write configurations with resolved values, except for those that come from variables of the environment."""

import hashlib
import os
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.resolvers import oc

_read = set[str]()  # the variables that interpolations have read since it was cleared


def _read_variable(name: str, *default: Any) -> str | None:
    if name in os.environ:
        _read.add(name)
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _read_variable, replace=True, use_cache=False)


def to_saved(part: Any) -> Any:
    """Return a part of the configuration as plain values, for files, logs and comparisons with files.

    Interpolations are resolved. One that depends on a variable of the environment stays text, so that the value is not
    saved, and is followed by four digits of a hash of its value, which show a change: `${oc.env:NAME} (3f1a)`.
    """
    if not OmegaConf.is_config(part):
        return part
    if part._is_none():
        return None
    if isinstance(part, DictConfig):
        return {key: _save(part, key) for key in part}
    return [_save(part, i) for i in range(len(part))]


def _save(parent: DictConfig | ListConfig, key: Any) -> Any:
    if OmegaConf.is_missing(parent, key):
        return "???"
    if not OmegaConf.is_interpolation(parent, key):
        return to_saved(parent[key])
    _read.clear()
    value = parent[key]
    if not _read:
        return to_saved(value)
    return f"{parent._get_node(key)._value()}{_mark(value)}"  # type: ignore[union-attr]


def _mark(value: Any) -> str:
    return f" ({hashlib.sha256(str(value).encode()).hexdigest()[:4]})"


def is_saved_form(saved: Any, value: Any) -> bool:
    """Return whether a setting with this value is saved in this form. Earlier versions saved the value itself."""
    if isinstance(saved, list) and isinstance(value, list) and len(saved) == len(value):
        return all(map(is_saved_form, saved, value))
    return bool(saved == value) or (isinstance(saved, str) and "${" in saved and saved.endswith(_mark(value)))


def to_yaml(values: Any) -> str:
    """Return plain values as YAML that OmegaConf reads as the same values."""
    return str(
        yaml.dump(values, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=get_omega_conf_dumper())
    )


def find_variables(value: Any, key: str = "") -> list[str]:
    """Return the keys of a saved configuration whose values came from the environment, so that they are unknown."""
    if isinstance(value, dict):
        return [found for name, child in value.items() for found in find_variables(child, f"{key}.{name}".strip("."))]
    if isinstance(value, list):
        return [key] if any(find_variables(part) for part in value) else []
    return [key] if isinstance(value, str) and "${" in value else []
