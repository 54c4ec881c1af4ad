"""Run a command: short error messages, exit statuses, and suggestions for misspelled and renamed keys."""

import difflib
import errno
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from var.config.check import FOLDER, PACKAGED
from var.config.versions import check_versions
from var.utils.errors import UserError
from var.utils.signals import leaving_on_signals
from var.utils.visible import protect_terminal, visible

# Old keys and values, and what to write instead.
RENAMED = {
    "store": "annotation_cache",
    "data.short_window": "data.last_step",
    "data.short_micro_batch": "data.last_micro_batch",
    "loss.drop_uninformative": "loss.drop_zero_variance",
    "loss.estimator.drop_uninformative": "loss.estimator.drop_zero_variance",
    "loss.centring": "loss.centering",
    "annotate=refuse": "annotate=error",
    "data.overlong=cut": "data.overlong=truncate",
    "reference=stored": "reference=cached",
}

FREE = ("chat_template_kwargs", "request", "architecture")  # mappings whose keys the user chooses
# Errors of a path that the user chose.
UNUSABLE = {
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP,
}  # fmt: skip

# Errors of a disk that does not answer.
GONE = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


def run_command(main: Callable[[], Any]) -> None:
    """Run a command. Print an error that the user can fix as one message without a traceback, and exit with 1.

    On SIGTERM and SIGUSR1, exit with 128 plus the signal. After a sweep, list all failed jobs. Until the command calls
    `gc.enable`, it imports without garbage collections, which would take a third of the time.
    """
    gc.disable()
    protect_terminal()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra passes the exception on instead of printing it
    caught: Exception | None = None
    sys.argv[1:] = (add_free_keys(_expand_home(word)) for word in sys.argv[1:])
    try:
        check_versions()
        if nameless := [word for word in sys.argv[1:] if word.startswith("=")]:
            raise UserError(f"{nameless[0]}: the key is missing (unset shell variable?). Write key{nameless[0]}")
        with leaving_on_signals():
            main()
    except Exception as error:
        caught = error
    finally:
        gc.enable()
        sweep = sys.modules.get("var.config.sweep")  # Hydra has imported it, if there are jobs
        if failures := sweep.end_sweep() if sweep else []:
            sys.stdout.flush()
            print("\nFailed jobs:", *failures, sep="\n", file=sys.stderr)
    if caught is None and not failures:
        return
    if caught is None:
        message = f"failed jobs: {len(failures)}. The same command runs them again and skips finished jobs."
    elif (described := describe(caught)) is not None:
        message = described
    elif failures:  # such as Optuna's error that no trial has a value
        message = f"{type(caught).__name__}: {caught}"
    else:
        raise caught
    sys.stdout.flush()
    print(f"Error: {visible(message)}", file=sys.stderr)
    sys.exit(1)


def _expand_home(word: str) -> str:
    """Expand ~ in `key=~/folder`. Shells leave it alone behind a key with a dot, and Hydra's grammar rejects it."""
    key, given, value = word.partition("=")
    return key + given + re.sub(r"(^|,)~(?=/|$)", lambda found: found[1] + str(Path.home()), value)


def add_free_keys(word: str) -> str:
    """Add the plus signs without which Hydra sets no key that is not in the configuration."""
    parts = word.partition("=")[0].split(".")
    return f"++{word}" if any(part in FREE for part in parts[1:]) and parts[0][:1] not in "+~" else word


def describe(error: BaseException) -> str | None:
    """Return the message for an error that the user can fix, or None."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    causes, cause = list[BaseException](), error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    for cause in causes:
        if isinstance(cause, UserError):
            return "\n".join((str(cause), *_suggest_renamed()))
    for cause in causes:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
            return (
                f"the disk is full: {cause}. Existing files are intact: free space, and the same command resumes from "
                "the last checkpoint"
            )
    for cause in causes:
        if (reason := _explain_path(cause)) is not None:
            return reason
    if unread := [cause for cause in causes if isinstance(cause, OverrideParseException)]:
        return _explain_override(unread[0].override)
    lines = [str(cause) for cause in causes if isinstance(cause, HydraException | OmegaConfBaseException)]
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    if missing := re.search(r"Missing mandatory value: ([\w.]+)", lines[-1]):
        return f"{missing[1]} must be given: {missing[1]}=…"
    if group := re.match(r"Multiple values for ([\w/]+)\.", lines[0]):
        return f"+{group[1]}=…: the configuration has this group. Write {group[1]}=…, without the plus sign."
    suggestions = _suggest_renamed()
    if unknown := re.match("Could not override '(.*)'", lines[0]):
        nodes = [node for cause in causes if (node := getattr(cause, "parent_node", None)) is not None]
        lines = _list_unknown_keys(nodes[0]._get_root()) if nodes else []
        if not lines and not suggestions:  # Hydra would advise to add the key with a plus sign
            lines = [f"{unknown[1]}: there is no such key or group. See: {_help()}"]
    elif option := re.match(r"(?:In '.*': )?Could not find '([\w/]+)/([^']*)'", lines[0]):
        names = re.findall(r"^\t?([\w.-]+)$", lines[0], re.M)
        near = difflib.get_close_matches(option[2], names, n=1, cutoff=0.5)
        offered = " ".join(name for name in names if not name.startswith("_"))
        lines = [f"{option[1]}={option[2]}: there is no such option of {option[1]}. It offers: {offered}"]
        suggestions = [f"Did you mean {option[1]}={name}?" for name in near] or suggestions
    return "\n".join(dict.fromkeys((*lines, *suggestions)))


def _explain_path(error: BaseException) -> str | None:
    """Return the message for an error of the file system at a path that the user chose, or None."""
    code, place = getattr(error, "errno", None), getattr(error, "filename", None)
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of libraries in Rust, such as safetensors
        code = int(found[1])
    if code is None:
        return None
    moved = code == errno.ENOENT and place is not None and not Path(os.fsdecode(place)).parent.exists()
    place = " ".join(str(error).split()) if place is None else f"{place}: {os.strerror(code)}"
    if (moved or code in GONE) and not _is_of_mkdir(error):
        return f"{place}; it was moved or removed, or its disk does not answer"
    return f"{place}; choose another folder or file" if code in UNUSABLE or _is_of_mkdir(error) else None


def _is_of_mkdir(error: BaseException) -> bool:
    """Return whether an error is of the creation of a folder, which /proc reports as a missing file."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].name in ("mkdir", "makedirs")


def _explain_override(word: str) -> str:
    """Return what is wrong with a word of the command line that Hydra's grammar does not accept."""
    key, given, value = word.partition("=")
    if not given:
        return f"{word}: expected key=value. See: {_help()}"
    quoted = value.replace("\\", "\\\\").replace('"', r"\"")
    return (
        f"{word}: Hydra cannot read this value. Quote it, for Hydra and for the shell: '{key}=\"{quoted}\"'. "
        "A list is key=[a,b], and an empty value is null."
    )


def _suggest_renamed() -> list[str]:
    """Return what to write instead of the renamed keys and values on the command line."""
    words = [word.lstrip("+~") for word in sys.argv[1:]]
    return [
        f"{old} was renamed: write {new}."
        for old, new in RENAMED.items()
        if any(word == old or word.startswith(f"{old}=") for word in words)
    ]


def name_command(name: str) -> list[str]:
    """Return the words that start a command, `annotate` for example: of a wheel, or in a checkout."""
    return [f"var-{name}"] if PACKAGED.is_dir() else ["python", f"{name}.py"]


def _help() -> str:
    return f"{' '.join(name_command(Path(sys.argv[0]).stem.removeprefix('var-')))} --help"


def _list_unknown_keys(root: DictConfig) -> list[str]:
    """Return a message for each key on the command line that is not in the configuration."""
    keys = [key for key, given, _ in (word.partition("=") for word in sys.argv[1:]) if given and key not in RENAMED]
    keys = [key for key in keys if re.fullmatch(r"(?!hydra\.)[\w.]+", key) and not (Path(FOLDER) / key).is_dir()]
    found = ((key, _suggest_key(root, key)) for key in keys)
    return [f"{key}: there is no such key. {suggestion}" for key, suggestion in found if suggestion is not None]


def _suggest_key(root: DictConfig, key: str) -> str | None:
    """Return None if the configuration has the key, else what to write instead."""
    node: Any = root
    parts = key.split(".")
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        siblings = [str(sibling) for sibling in node] if isinstance(node, DictConfig) and not node._is_none() else []
        if part in siblings:
            node = node._get_node(part)
            continue
        if not path:  # the first word of the path is wrong, but the last may be right
            keys = [other for other in list_keys(root) if not other.startswith("hydra.")]
            near = [other for other in keys if other.rpartition(".")[2] == parts[-1]]
            near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
            return f"Did you mean {' or '.join(near)}?" if near else f"See: {_help()}"
        if near := difflib.get_close_matches(part, siblings, n=1):
            return f"Did you mean {path}.{near[0]}?"
        offered = ", ".join(sibling for sibling in siblings if sibling != "_target_")
        if offered:
            return f"{path} has the keys {offered}."
        own = f" An argument of your own class needs a plus sign: +{key}=…" if "_target_" in siblings else ""
        return f"{path} has no keys in this configuration.{own}"
    return None


def list_keys(node: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration, without `_target_` and `_partial_`."""
    if not isinstance(node, DictConfig):
        yield path
        return
    for key in node:
        if key not in ("_target_", "_partial_"):
            child = node._get_node(key)
            yield from list_keys(child, ".".join(filter(None, (path, str(key)))))
