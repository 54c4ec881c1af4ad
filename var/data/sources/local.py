"""Read local files record by record: JSON lines (.jsonl, .jsonl.gz, .json) and Parquet."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from var.data.messages import without_padding
from var.utils.errors import UserError

LINES = (".jsonl", ".jsonl.gz")
SUFFIXES = (*LINES, ".parquet")


class LocalSource:
    """Base of adapters of local files. A subclass is a dataclass with a field `path`, and adds `row`."""

    suffixes = SUFFIXES

    def files(self) -> list[Path]:
        """Return the files to read."""
        return list_files(self.path, "data.path", self.suffixes)  # type: ignore[attr-defined]

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, record) of all files."""
        return read_records(self.files())

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the settings with the stamps of all files."""
        return describe_source(self, self.files())


def list_files(path: str, key: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return the file `path`, or the sorted files of the folder `path`. Errors name the setting `key`."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{path}: no such file or folder. Set `{key}=` to a {', '.join(suffixes)} or a folder of these")
    found = sorted(file for file in place.iterdir() if file.name.endswith(tuple(suffixes)))
    if not found:
        raise UserError(f"{path}: the folder has no {', '.join(suffixes)}. Set `{key}=` to one that does")
    if strange := [file.name for file in found if not file.is_file()]:
        raise UserError(f"{path}: not a regular file: {', '.join(strange)}. Move them away, or set `{key}=` to a file")
    return found


def is_local(path: str) -> bool:
    """Return whether this is a path, not a hub id (`owner/name`)."""
    return Path(path).expanduser().exists() or path.endswith(SUFFIXES) or path.startswith(("/", ".", "~"))


def read_records(files: Sequence[Path], batch: int = 1024) -> Iterator[tuple[str, Any]]:
    """Yield (where, record): a line as bytes for `parse_record`, or a Parquet row. Hold at most `batch` rows."""
    for file in files:
        if file.name.endswith(".parquet"):
            yield from _read_parquet(file, batch)
        else:
            yield from _read_lines(file)


def _read_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    opener: Callable[..., Any] = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file.name}:{number}", line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: incomplete gzip file ({error}). Download it again") from error


def _read_parquet(file: Path, batch: int) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for part in table.iter_batches(batch_size=batch):
                for record in part.to_pylist():
                    number += 1
                    yield f"{file.name}:row {number}", without_padding(record)
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"{file}: not readable as Parquet after row {number} ({error}). Download it again") from error


def parse_record(record: Any) -> Mapping[str, Any]:
    """Return the object in a line of JSON, or a record that is an object already. Otherwise raise a ValueError."""
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text: byte {error.object[error.start]:#x} at {error.start}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError:
            raise ValueError("JSON that is nested too deeply to be read") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"expected one JSON object per line, got {type(record).__name__}")
    return record


def describe_source(source: Any, files: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the class, fields and files of an adapter as JSON values, for its `fingerprint`.

    A file is [path, size, mtime_ns, ctime_ns]: a copy may keep name, size and mtime, but not the ctime.
    """
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    content = {"source": type(source).__name__} | {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in values.items()
    }
    stats = [(file.resolve(), file.stat()) for file in files]
    stamps = [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]
    return {**content, "files": stamps} if stamps else content
