"""Write files that are either complete or absent, even if the process is killed."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from var.utils.visible import CONTROLS

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # errors of a folder that may be read and not written


def try_to_write(folder: Path) -> OSError | None:
    """Return the error with which a folder cannot be written, or None. It is made if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def replace_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which JSON can hold and UTF-8 cannot, by question marks."""
    return text.encode("utf-8", "replace").decode()


def make_file_name(name: str, limit: int = 160) -> str:
    """Return `name` as the name of a file or folder: without slashes and controls, and at most `limit` bytes long.

    It is neither empty nor `..`, and no hidden file. A longer name keeps its beginning and gets a hash. File systems
    allow 255 bytes, and files get endings.
    """
    name = re.sub(rf"[/\\\n\t]+|{CONTROLS.pattern}+|^\.+", "-", replace_surrogates(name)) or "-"
    if len(name.encode()) <= limit:
        return name
    ending = f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name.encode()[: limit - len(ending)].decode(errors="ignore") + ending


def name_partial(path: Path) -> Path:
    """Return a new name next to `path` for writing it. Nobody can guess it and put a link there."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def remove_partials(path: Path) -> None:
    """Remove what killed processes have left of `path`. No other process may be writing it."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 32}.partial"):
        remove(left)


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path; if the `with` block succeeds, sync the file there and rename it to `path`.

    Set `shared` if other processes, also on other machines, may write the same path at the same time.
    """
    if not shared:
        remove_partials(path)
    partial = name_partial(path)
    try:
        yield partial
        synchronize(partial)
        partial.replace(path)
        synchronize_folder(path.parent)
    except BaseException:  # also KeyboardInterrupt
        with suppress(OSError):  # keep the first error
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic(path: Path, mode: str = "w", shared: bool = False, **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file for writing; sync it and rename it to `path` if the `with` block succeeds.

    `shared` is passed to `replacing`, `options` to `open`.
    """
    with replacing(path, shared) as partial, partial.open(mode.replace("w", "x"), **options) as file:
        yield file


def synchronize(path: Path) -> None:
    """Wait until a file, or a folder with all its files, is on the disk. Links are not followed."""
    if path.is_symlink():
        return
    if path.is_dir():
        for child in path.iterdir():
            synchronize(child)
        synchronize_folder(path)
    elif path.is_file():
        _sync(path)


def synchronize_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, if its file system can do that."""
    try:
        _sync(path)
    except OSError as error:  # EACCES: a folder can be writable and not readable
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
