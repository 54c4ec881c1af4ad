"""Record what a result depends on: content hashes, versions, machine and commit."""

import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "transformers", "datasets", "hydra-core")


def collect_environment() -> dict[str, Any]:
    """Return the versions of Python and the main packages, the machine type, and the commit of this repository."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        if not (root / "pyproject.toml").exists():  # a wheel, perhaps within another repository
            return ""
        try:
            return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),  # a user's data may lie in the checkout
        "machine": platform.machine(),
    }


_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def dump(value: Any) -> bytes:
    """Return a JSON value in canonical form: sorted keys, no spaces."""
    return _canonical.encode(value).encode("utf-8", "surrogatepass")


def hash_content(*parts: Any) -> bytes:
    """Return the first 16 bytes of the SHA-256 of JSON values in canonical form."""
    return hashlib.sha256(dump(parts)).digest()[:16]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
