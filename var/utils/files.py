"""Files that stand whole or not at all, wherever a process is killed."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def encodable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name beside `path` that becomes `path` once what is written there is whole. shared: other processes, on other
    machines too, may write it at once."""
    partial = path.with_name(f"{path.name}{f'.{uuid.uuid4().hex}' if shared else ''}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):  # what the disk said first is what is told
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic(path: Path, mode: str = "w", shared: bool = False, **options: Any) -> Iterator[IO[Any]]:
    """A file to write, which takes the name `path` once it is written. shared: see `replacing`."""
    with replacing(path, shared) as partial, partial.open(mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; values that JSON does not know are written as text."""
    with atomic(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, default=str)
