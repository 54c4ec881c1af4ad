"""Composed configurations are checked as a whole before anything heavy is imported or loaded; errors are short."""

import difflib
import errno
import hashlib
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from var import signatures
from var.problems import Problems, UserError

FOLDER = str(Path(__file__).parent.parent / "conf")
# Keys that no dataclass reads: build.py reads the first, optim's ${model.learning_rate} the second.
NAMES = {("strategy", "name"), ("model", "learning_rate")}
# What a run's folder does not depend on: the same training goes on under another logger or on other devices.
ELSEWHERE = {"hydra", "resume", "logger", "store", "cache", "runs", "annotate", "dry"}
DEVICES = ("devices", "num_nodes")  # trainer's: a run goes on with others
# The dataclass that reads a part which is no `_target_`, by dotted name, so that nothing heavy is imported here.
TRAIN = {
    "": "var.build.RunSettings",
    "model": "var.pretrained.Pretrained",
    "data": "var.datamodule.DataGroup",
    "generate": "var.generate.Sampling",
    "optim": "var.build.OptimSettings",
    "trainer": "var.build.TrainerSettings",
    "eval": "var.build.EvalSettings",
    "eval.sampling": "var.generate.Sampling",
    "logger": "var.build.LoggerSettings",
    "logger.wandb": "var.build.WandbSettings",
    "logger.tensorboard": "var.build.TensorBoardSettings",
}
EVAL = {
    "": "var.evaluate.build.EvalConfig",
    "model": "var.pretrained.Pretrained",
    "data": "var.datamodule.DataGroup",
    "more.*": "var.datamodule.DataGroup",
    "generate": "var.generate.Sampling",
}


def digest(cfg: DictConfig, seeds: bool = True) -> str:
    """Of what a run computes: the same wherever it stands, and, without seeds, for the runs of one configuration."""

    def kept(node: Any) -> Any:
        return {k: kept(v) for k, v in node.items() if seeds or k != "seed"} if isinstance(node, dict) else node

    content = kept(OmegaConf.to_container(cfg, resolve=False))
    content = {k: v for k, v in content.items() if k not in ELSEWHERE}
    if "trainer" in content:
        content["trainer"] = {k: v for k, v in content["trainer"].items() if k not in DEVICES}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def run_dir(root: str, model: str, data: str, loss: str, *, _root_: DictConfig) -> str:
    """A run's folder: readable, and the same for the same configuration, so that the same command goes on with it."""
    name = f"{model}_{data}_{loss}-{digest(_root_)}"
    if _root_.get("resume") is not False:
        return f"{root}/{name}"
    known = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID", "TORCHELASTIC_RUN_ID")  # the same for every rank of a job
    job = next((value for key in known if (value := os.environ.get(key)) and value != "none"), None)
    job = job or (str(os.getppid()) if "RANK" in os.environ else None)
    number = job or next(n for n in range(2, 100_000) if not Path(_root_["runs"], f"{name}-{n}").exists())
    return f"{root}/{name}-{number}"


OmegaConf.register_new_resolver("run_dir", run_dir, replace=True, use_cache=False)


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of a configuration, `_target_` left away."""
    if not isinstance(node, DictConfig):
        yield path
        return
    for key in node:
        if key not in ("_target_", "_partial_"):
            child = node._get_node(key)
            yield from leaves(child, ".".join(filter(None, (path, str(key)))))


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


def name_rank() -> None:
    """Give a process that SLURM or submitit started its rank, the number of ranks and where they meet by torch's names
    (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, …), as torchrun has done for its own."""
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        # the node's GPUs stay visible to each of its processes: Lightning gives each its own
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    elif "SLURM_NTASKS" in os.environ and "RANK" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        if SLURMEnvironment.detect():  # not within an interactive allocation, whose shell has the variable as well
            slurm = SLURMEnvironment()
            ranks: dict[str, Any] = {
                "RANK": slurm.global_rank(),
                "LOCAL_RANK": slurm.local_rank(),
                "WORLD_SIZE": slurm.world_size(),
            }
            ranks |= {"LOCAL_WORLD_SIZE": os.environ.get("SLURM_NTASKS_PER_NODE", 1), "NODE_RANK": slurm.node_rank()}
            meeting = {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": slurm.main_port}
            os.environ |= {name: str(value) for name, value in (ranks | meeting).items()}


def run(main: Callable[[], Any], config_name: str) -> None:
    """Run an entry point; what the user can mend is one message without a traceback, and exit status 1."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands the exception on instead of printing it
    try:
        main()
    except Exception as error:
        message = _message(error, config_name)
        if message is None:
            raise
        sys.stdout.flush()
        print(f"Error: {message}", file=sys.stderr)
        sys.exit(1)


def _message(error: BaseException, config_name: str) -> str | None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    causes, cause = [], typing.cast(BaseException | None, error)
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
    for cause in causes:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
            return (
                f"the disk is full: {cause}. What stood before is whole: free space, and the same command goes on "
                "from the last checkpoint"
            )
    if isinstance(error, NotADirectoryError | FileExistsError | PermissionError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; choose another folder or file"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = "\n".join(
        dict.fromkeys(str(cause) for cause in causes if isinstance(cause, HydraException | OmegaConfBaseException))
    )
    for cause in causes:
        key = getattr(cause, "full_key", None)
        if isinstance(key, str) and (near := nearest(key, config_name)):
            text += f"\nDid you mean {near}?"
            break
    return text


def nearest(key: str, config_name: str) -> str | None:
    """The known key most like `key`, in the configuration of the groups that were asked for."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    chosen = [a for a in sys.argv[1:] if Path(FOLDER, a.split("=")[0]).is_dir() and "," not in a]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(FOLDER, version_base="1.3"):
            known = list(leaves(compose(config_name, chosen)))
    except Exception:
        return None
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.5)), None)
