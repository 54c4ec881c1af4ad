"""Files that stand whole or not at all, wherever a process is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic(path: Path, mode: str = "w", shared: bool = False, **options: Any) -> Iterator[IO[Any]]:
    """A file to write, which takes the name `path` once it is written. shared: other processes may write it too."""
    partial = path.with_name(f"{path.name}.partial{os.getpid() if shared else ''}")
    try:
        with partial.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
