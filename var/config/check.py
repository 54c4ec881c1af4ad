"""Check a composed configuration before anything expensive is imported or loaded."""

import difflib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from var.config import signatures
from var.config.run_dir import model_name, own_key, run_dir
from var.config.secrets import find_secrets
from var.utils.errors import Problems, UserError
from var.utils.extras import PACKAGED

FOLDER = str(PACKAGED if PACKAGED.is_dir() else PACKAGED.parents[1] / "conf")

# Keys that no class takes: var/training/run.py reads the first, optim's ${model.learning_rate} the second.
READ_ELSEWHERE = {("strategy", "name"), ("model", "learning_rate")}

# The dataclass that takes each part without a `_target_`, as a dotted name, so that nothing is imported here.
TRAIN = {
    "": "var.config.schema.RunSettings",
    "model": "var.models.pretrained.Pretrained",
    "data": "var.data.settings.DataGroup",
    "generate": "var.sampling.base.Sampling",
    "optim": "var.config.schema.OptimSettings",
    "trainer": "var.config.schema.TrainerSettings",
    "eval": "var.config.schema.EvalSettings",
    "eval.sampling": "var.sampling.base.Sampling",
    "export": "var.config.schema.ExportSettings",
    "logger": "var.config.schema.LoggerSettings",
    "logger.wandb": "var.config.schema.WandbSettings",
    "logger.tensorboard": "var.config.schema.TensorBoardSettings",
    "logger.mlflow": "var.config.schema.MLflowSettings",
}
EVAL = {
    "": "var.config.schema.EvalConfig",
    "model": "var.models.pretrained.Pretrained",
    "data": "var.data.settings.DataGroup",
    "more.*": "var.data.settings.DataGroup",
    "generate": "var.sampling.base.Sampling",
}

# Keys of paths and addresses. An empty one is mostly an unset variable of the shell, and would be the current folder.
PATHS = {
    "annotation_cache", "base_url", "cache", "chat_template", "difficulty", "folder", "gamed", "out", "path", "resume",
    "revision", "template",
}  # fmt: skip

OmegaConf.register_new_resolver("run_dir", run_dir, replace=True, use_cache=False)
OmegaConf.register_new_resolver("own_key", own_key, replace=True, use_cache=False)
OmegaConf.register_new_resolver("model_name", model_name, replace=True, use_cache=False)


def check(cfg: DictConfig, schemas: Mapping[str, Any], imports: bool = True) -> None:
    """Report wrong types, unknown keys, missing keys and secrets of all parts in one UserError.

    schemas: the dataclass, or its dotted name, that takes each part without a `_target_`; `a.*` is any part of `a`.
    imports: if False, read signatures from the source if it is clear enough, in a fraction of a second. Commands check
    in this way first, and with imports=True before they build anything.
    """
    problems = Problems("invalid configuration")
    unresolved = OmegaConf.to_container(cfg, resolve=False)
    for key, problem in find_secrets(unresolved):
        problems.add(key, problem)
    referenced = set(_find_references(unresolved, ()))
    for path, node in _parts(cfg):
        for key in PATHS & set(map(str, node)):
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key) and node[key] == "":
                problems.add(".".join(filter(None, (path, key))), "is empty (unset shell variable?)")
        if OmegaConf.is_missing(node, "_target_"):
            continue
        target = node.get("_target_") or schemas.get(path) or schemas.get(f"{path.rpartition('.')[0]}.*")
        if target is not None:
            parameters = signatures.read(target) if isinstance(target, str) and not imports else None
            if parameters is None:
                parameters = signatures.imported(_import(target) if isinstance(target, str) else target)
            _check_part(path, node, parameters, referenced, problems)
    for missing in sorted(map(str, OmegaConf.missing_keys(cfg))):
        problems.add(missing, f"must be given: {missing}=…")
    problems.check()


def _find_references(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the key that each interpolation refers to. `${..key}` is relative to its place."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _find_references(child, (*path, str(key)))
    for reference in re.findall(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else ():
        key = reference.lstrip(".")
        up = len(reference) - len(key)
        yield ".".join((*path[: len(path) - up], key)) if up else key


def _parts(node: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    yield path, node
    for key in node:
        child = node._get_node(key)
        if key != "hydra" and isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from _parts(child, ".".join(filter(None, (path, str(key)))))


def _import(name: str) -> Any:
    from hydra.utils import get_object

    try:
        found = get_object(name)
    except Exception as error:
        cause = error.__cause__ or error
        reason = str(cause).splitlines()[-1]
        advice = "If it is your own, put the folder of its module on PYTHONPATH (examples/README.md)."
        module, _, last = name.rpartition(".")
        if module in sys.modules and isinstance(cause, ImportError | AttributeError):
            own = [n for n, value in vars(sys.modules[module]).items() if getattr(value, "__module__", "") == module]
            reason, advice = f"{module} has no {last}", f"It has {', '.join(own) or 'no classes'}."
        elif not isinstance(cause, ImportError | AttributeError):
            reason, advice = f"{type(cause).__name__}: {reason}", "Its module was found, and raises this error."
        raise UserError(f"_target_={name} cannot be imported ({reason}). {advice}") from error
    if not callable(found):
        raise UserError(f"_target_={name} is not a class or a function. Write module.Class.")
    return found


def _check_part(
    path: str, node: DictConfig, parameters: signatures.Parameters, referenced: set[str], problems: Problems
) -> None:
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keys = {str(key) for key in node} - {"_target_", "_partial_", "_recursive_", "_convert_"}
    prefix = f"{path}." if path else ""
    for key in sorted(keys - set(parameters)):
        if not open_ended and f"{prefix}{key}" not in referenced and (path, key) not in READ_ELSEWHERE:
            near = difflib.get_close_matches(key, parameters, n=1)
            problems.add(f"{prefix}{key}", "nothing reads this key" + (f"; did you mean {near[0]}?" if near else ""))
    for key in sorted(keys & set(parameters)):
        value = None if OmegaConf.is_missing(node, key) else node.get(key)
        if OmegaConf.is_missing(node, key) or (isinstance(value, DictConfig) and "_target_" in value):
            continue
        hint = parameters[key].annotation
        if not fits(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, hint):
            problems.add(f"{prefix}{key}", f"expected {_describe(hint)}, got {value!r}")
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY
        if required and key not in keys and not node.get("_partial_"):
            problems.add(f"{prefix}{key}", "this key is missing")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a YAML value has the annotated type. An int is a float, and a list is a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is dict:
        return isinstance(value, dict)
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(fits(v, arguments[0]) for v in value if arguments)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or hint not in (bool, str, type(None)) or isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Literal, typing.Union, types.UnionType):
        return " or ".join(map(_describe, typing.get_args(hint)))
    if hint in (None, type(None)):
        return "null"
    if typing.get_origin(hint) is dict:
        return "settings"
    return hint.__name__ if isinstance(hint, type) else str(hint)
