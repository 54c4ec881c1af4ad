"""Import optional dependencies."""

import importlib
from pathlib import Path
from typing import Any

from var.utils.errors import UserError

PACKAGED = Path(__file__).parents[1] / "conf"  # a wheel contains it; setup.py copies it


def name_install(extra: str) -> str:
    """Return the command that installs an extra of this package, from an index or in a checkout."""
    return f"pip install 'var-align[{extra}]'" if PACKAGED.is_dir() else f"pip install -e '.[{extra}]'"


def import_extra(module: str, extra: str, feature: str) -> Any:
    """Return an imported module of an optional dependency.

    If it is not installed, raise a `UserError` that names the feature and the extra of this package that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{feature} needs an extra: {name_install(extra)}") from error
