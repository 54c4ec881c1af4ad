"""Local files of records: JSON lines (.jsonl, .jsonl.gz, .json) and Parquet, read record by record."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from var.utils.errors import UserError

LINES = (".jsonl", ".jsonl.gz")
SUFFIXES = (*LINES, ".parquet")


def listed(path: str, key: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The file `path`, or the files of the folder `path` by name. key: the setting, for the message."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{path}: no such file or folder; set `{key}=` to a {', '.join(suffixes)} or a folder of these")
    found = sorted(file for file in place.iterdir() if file.name.endswith(tuple(suffixes)))
    if not found:
        raise UserError(f"{path}: the folder holds no {', '.join(suffixes)}; set `{key}=` to one that does")
    if strange := [file.name for file in found if not file.is_file()]:
        raise UserError(f"{path}: {', '.join(strange)} there is a folder or a dead link; move it away, or name a file")
    return found


def is_local(path: str) -> bool:
    """A path rather than a hub id, which is `owner/name`."""
    return Path(path).expanduser().exists() or path.endswith(SUFFIXES) or path.startswith(("/", ".", "~"))


def records(files: Sequence[Path], batch: int = 1024) -> Iterator[tuple[str, Any]]:
    """(where, record) of every file: a line as bytes, for `parse`, or a Parquet row; never more than `batch` held."""
    for file in files:
        if file.name.endswith(".parquet"):
            yield from _parquet(file, batch)
        else:
            yield from _lines(file)


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    opener: Callable[..., Any] = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file.name}:{number}", line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: not a whole gzip file ({error}); fetch it again") from error


def _parquet(file: Path, batch: int) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a Parquet file ({error}); fetch it again") from error
    with table:
        number = 0
        try:
            for part in table.iter_batches(batch_size=batch):
                for record in part.to_pylist():
                    number += 1
                    yield f"{file.name}:row {number}", record
        except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError) as error:
            raise UserError(f"{file}: what follows row {number} cannot be read ({error}); fetch it again") from error


def parse(record: Any) -> Mapping[str, Any]:
    """The object that a line of JSON holds; a record that is one already stays. Anything else is a ValueError."""
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text: byte {error.object[error.start]:#x} at {error.start}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError:
            raise ValueError("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"a line is one JSON object, got {type(record).__name__}")
    return record


def settings(source: Any) -> dict[str, Any]:
    """Class and fields of an adapter as JSON values, for its `identity`."""
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    return {"source": type(source).__name__} | {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in values.items()
    }


def stamps(files: Sequence[Path]) -> list[list[Any]]:
    """[path, size, mtime_ns, ctime_ns] of each file: a copy may keep name, size and mtime, but no ctime."""
    stats = [(file.resolve(), file.stat()) for file in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]
