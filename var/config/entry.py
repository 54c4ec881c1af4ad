"""Run an entry point: short errors, exit statuses, and the nearest key to a misspelled one."""

import difflib
import errno
import os
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from var.config.check import FOLDER
from var.utils.errors import UserError


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of a configuration, `_target_` left away."""
    if not isinstance(node, DictConfig):
        yield path
        return
    for key in node:
        if key not in ("_target_", "_partial_"):
            child = node._get_node(key)
            yield from leaves(child, ".".join(filter(None, (path, str(key)))))


def run_command(main: Callable[[], Any], config_name: str) -> None:
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
