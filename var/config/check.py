"""Composed configurations are checked as a whole before anything heavy is imported or loaded; errors are short."""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from var.config import signatures
from var.config.run_dir import run_dir
from var.utils.errors import Problems, UserError

FOLDER = str(Path(__file__).parents[2] / "conf")


# Keys that no dataclass reads: build.py reads the first, optim's ${model.learning_rate} the second.
NAMES = {("strategy", "name"), ("model", "learning_rate")}


# The dataclass that reads a part which is no `_target_`, by dotted name, so that nothing heavy is imported here.
TRAIN = {
    "": "var.config.schema.RunSettings",
    "model": "var.models.pretrained.Pretrained",
    "data": "var.data.settings.DataGroup",
    "generate": "var.sampling.base.Sampling",
    "optim": "var.config.schema.OptimSettings",
    "trainer": "var.config.schema.TrainerSettings",
    "eval": "var.config.schema.EvalSettings",
    "eval.sampling": "var.sampling.base.Sampling",
    "logger": "var.config.schema.LoggerSettings",
    "logger.wandb": "var.config.schema.WandbSettings",
    "logger.tensorboard": "var.config.schema.TensorBoardSettings",
}


EVAL = {
    "": "var.config.schema.EvalConfig",
    "model": "var.models.pretrained.Pretrained",
    "data": "var.data.settings.DataGroup",
    "more.*": "var.data.settings.DataGroup",
    "generate": "var.sampling.base.Sampling",
}


OmegaConf.register_new_resolver("run_dir", run_dir, replace=True, use_cache=False)


def check(cfg: DictConfig, schemas: Mapping[str, Any], imports: bool = True) -> None:
    """Wrong types, unknown and missing keys of every part, all at once.

    schemas: for each part that is no `_target_`, the dataclass that reads it, or its dotted name; `part.*` is any part
    of it. A `_target_` is its own. A key is read, too, where another one refers to it.
    imports: False reads what has a name from its source, as far as that says, in a fraction of a second: the entry
    points do before they import the rest. True is the last word: it tells, too, what cannot be imported.
    """
    problems = Problems("the configuration cannot be used")
    referred = set(_referred(OmegaConf.to_container(cfg, resolve=False), ()))
    for path, node in _parts(cfg):
        target = node.get("_target_") or schemas.get(path) or schemas.get(f"{path.rpartition('.')[0]}.*")
        if target is not None:
            signature = signatures.read(target) if isinstance(target, str) and not imports else None
            if signature is None:
                signature = signatures.imported(_locate(target) if isinstance(target, str) else target)
            _check_part(path, node, signature.parameters, referred, problems)
    for missing in sorted(map(str, OmegaConf.missing_keys(cfg))):
        problems.add(missing, f"must be given: {missing}=…")
    problems.check()


def _referred(value: Any, place: tuple[str, ...]) -> Iterator[str]:
    """The keys that some interpolation reads; of `${..key}`, too, which counts from where it stands."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _referred(child, (*place, str(key)))
    for reference in re.findall(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else ():
        key = reference.lstrip(".")
        up = len(reference) - len(key)
        yield ".".join((*place[: len(place) - up], key)) if up else key


def _parts(node: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    yield path, node
    for key in node:
        child = node._get_node(key)
        if key != "hydra" and isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from _parts(child, ".".join(filter(None, (path, str(key)))))


def _locate(name: str) -> Any:
    from hydra.utils import get_object

    try:
        return get_object(name)
    except Exception as error:
        raise UserError(f"_target_: {name} cannot be imported: {error}") from error


def _check_part(
    path: str, node: DictConfig, parameters: Mapping[str, inspect.Parameter], referred: set[str], problems: Problems
) -> None:
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {str(key) for key in node} - {"_target_", "_partial_", "_recursive_", "_convert_"}
    prefix = f"{path}." if path else ""
    for key in sorted(given - set(parameters)):
        if not open_ended and f"{prefix}{key}" not in referred and (path, key) not in NAMES:
            near = difflib.get_close_matches(key, parameters, n=1)
            problems.add(f"{prefix}{key}", "nothing reads this key" + (f"; did you mean {near[0]}?" if near else ""))
    for key in sorted(given & set(parameters)):
        if OmegaConf.is_missing(node, key):
            continue
        value = node.get(key)
        if isinstance(value, DictConfig) and value.get("_target_"):
            continue
        hint = parameters[key].annotation
        if not fits(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, hint):
            problems.add(f"{prefix}{key}", f"{value!r} is no {_shown(hint)}")
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY
        if required and key not in given and not node.get("_partial_"):
            problems.add(f"{prefix}{key}", "this key is not there")


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of the annotated type; an int is a float, a list is a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(fits(v, arguments[0]) for v in value if arguments)
    return True


def _shown(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("None" if part is type(None) else _shown(part) for part in typing.get_args(hint))
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")  # type: ignore[return-value]
