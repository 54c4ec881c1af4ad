"""Import optional dependencies."""

import importlib
from typing import Any

from var.utils.errors import UserError


def import_extra(module: str, extra: str, feature: str) -> Any:
    """Return an imported module of an optional dependency.

    If it is not installed, raise a `UserError` that names the feature and the extra of this package that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{feature} needs an extra: pip install -e '.[{extra}]'") from error
