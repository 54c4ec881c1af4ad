"""Write files that are either complete or absent, even if the process is killed."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def replace_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which JSON can hold and UTF-8 cannot, by question marks."""
    return text.encode("utf-8", "replace").decode()


def make_file_name(name: str, limit: int = 160) -> str:
    """Return `name` as the name of a file or folder: without slashes, and at most `limit` bytes long.

    A longer name keeps its beginning and gets a hash. File systems allow 255 bytes, and files get endings.
    """
    name = re.sub(r"[/\\\x00-\x1f]+", "-", replace_surrogates(name))
    if len(name.encode()) <= limit:
        return name
    ending = f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name.encode()[: limit - len(ending)].decode(errors="ignore") + ending


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` if the `with` block succeeds.

    Set `shared` if other processes, also on other machines, may write the same path at the same time.
    """
    partial = path.with_name(f"{path.name}{f'.{uuid.uuid4().hex}' if shared else ''}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:  # also KeyboardInterrupt
        with suppress(OSError):  # keep the first error
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic(path: Path, mode: str = "w", shared: bool = False, **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file for writing; sync it and rename it to `path` if the `with` block succeeds.

    `shared` is passed to `replacing`, `options` to `open`.
    """
    with replacing(path, shared) as partial, partial.open(mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; values that JSON does not know are written as text."""
    with atomic(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, default=str)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
