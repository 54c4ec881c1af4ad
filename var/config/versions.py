"""Check the installed packages against the bounds in pyproject.toml, before anything heavy is imported."""

import re
import shlex
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from var.utils.errors import UserError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def check_versions() -> None:
    """Raise a `UserError` of one line if packages are missing or outside their bounds.

    A pre-release counts as its release: NVIDIA's images contain builds such as torch 2.11.0a0.
    """
    if not PYPROJECT.exists():  # installed from a wheel: pip has checked the bounds
        return
    problems, wanted, missing = list[str](), list[str](), list[str]()
    for need in tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]:
        name, bounds = re.fullmatch(r"([\w.-]+)(.*)", need).groups()  # type: ignore[union-attr]
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        if Version(found).base_version not in SpecifierSet(bounds):
            problems.append(f"{name}: version {found} is installed, but {need} is needed.")
            wanted.append(shlex.quote(need))
    if missing:
        problems.append(f"{', '.join(missing)}: not installed.")
        wanted = ["-e", shlex.quote(str(PYPROJECT.parent))]
    if problems:
        raise UserError(f"{' '.join(problems)} Run: pip install {' '.join(wanted)}")
