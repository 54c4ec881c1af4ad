"""Read local files record by record: JSON lines, JSON arrays, CSV, TSV and Parquet. All but an array are streamed."""

import csv
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from var.data.messages import without_padding
from var.utils.errors import UserError

TEXT = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (*TEXT, ".parquet")
UTF16 = (b"\xff\xfe", b"\xfe\xff")
ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # with files, and empty


class Cells(dict[str, Any]):
    """A record of a CSV or TSV file. All its values are text, or None for an empty cell."""


class LocalSource:
    """Base of adapters of local files. A subclass is a dataclass with a field `path`, and adds `row`."""

    suffixes: ClassVar[Sequence[str]] = SUFFIXES

    def files(self) -> list[Path]:
        """Return the files to read."""
        return list_files(self.path, "data.path", self.suffixes)  # type: ignore[attr-defined]

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, record) of all files."""
        return self.read(self.files())

    def read(self, files: list[Path]) -> Iterator[tuple[str, Any]]:
        """Yield (where, record) of files."""
        return read_records(files)

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
    if (place / "dataset_info.json").exists() and (place / "state.json").exists():
        raise UserError(f"{path}: a folder of save_to_disk. Write a file with to_parquet, and set `{key}=` to it")
    files = (file for file in place.iterdir() if not file.name.startswith("."))  # other programs' own files
    found = sorted(file for file in files if file.name.endswith(tuple(suffixes)))
    if not found:
        raise UserError(f"{path}: the folder has no {', '.join(suffixes)}. Set `{key}=` to one that does")
    if strange := [file.name for file in found if not file.is_file()]:
        raise UserError(f"{path}: not a regular file: {', '.join(strange)}. Move them away, or set `{key}=` to a file")
    return found


def is_local(path: str) -> bool:
    """Return whether this is a path, not a hub id (`owner/name`)."""
    place = Path(path).expanduser()
    return place.exists() or path.endswith(SUFFIXES) or path.count("/") != 1 or place.parent.is_dir() or path[0] in ".~"


def read_records(files: Sequence[Path], batch: int = 1024) -> Iterator[tuple[str, Any]]:
    """Yield (where, record): a line as bytes, or an object. `parse_record` returns the object of both.

    Hold at most `batch` rows, except of a JSON array.
    """
    for file in files:
        name = file.name.removesuffix(".gz")
        if name.endswith(".parquet"):
            yield from _read_parquet(file, batch)
        elif name.endswith((".csv", ".tsv")):
            yield from _read_table(file)
        elif (array := _read_array(file)) is not None:
            yield from ((f"{file.name}:row {number}", record) for number, record in enumerate(array, start=1))
        else:
            yield from read_lines(file)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open a file for reading, without a byte order mark. It is decompressed if it is a gzip file."""
    with file.open("rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        if start in ZIP:
            raise UserError(f"{file}: a ZIP file, as Excel and Numbers write. Save it as CSV or Parquet")
        if start[:2] in UTF16:
            raise UserError(f"{file}: text in UTF-16. Save it as UTF-8")
        compressed = start[:2] == b"\x1f\x8b" or file.name.endswith(".gz")
        with gzip.open(raw) if compressed else nullcontext(raw) as stream:
            try:
                if stream.read(3) != b"\xef\xbb\xbf":
                    stream.seek(0)
                yield stream
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{file}: incomplete gzip file ({error}). Download it again") from error


def read_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (where, line) of each line that is not blank."""
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file.name}:{number}", line


def _read_array(file: Path) -> list[Any] | None:
    """Return the items of a file that is one JSON array; None if it has one object per line."""
    with _open(file) as stream:
        first = next((line for line in stream if line.strip()), b"")
        if not first.lstrip().startswith((b"[", b"{")) or (first.lstrip().startswith(b"{") and _is_json(first)):
            return None
        content = first + stream.read()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if first.lstrip().startswith(b"{") or _is_json(first):
            return None  # each line is checked by itself
        raise UserError(f"{file}: not a JSON array: {error}") from None
    if isinstance(value, list):
        return value
    raise UserError(f"{file}: one JSON object over several lines. Write one object per line, or an array of objects")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    except RecursionError:
        pass
    return True


def _read_table(file: Path) -> Iterator[tuple[str, Cells]]:
    """Yield the records of a CSV or TSV file. `where` has the line on which a record begins."""
    csv.field_size_limit(sys.maxsize)
    first, last = 1, 0  # lines of the record that is read
    with _open(file) as stream:

        def decode() -> Iterator[str]:
            nonlocal last
            for last, line in enumerate(stream, start=1):  # noqa: B007  it is read outside
                yield line.decode()

        lines = decode()
        try:
            header = next(lines, "")
            tabs = file.name.removesuffix(".gz").endswith(".tsv")
            delimiter = "\t" if tabs else max(",;\t", key=header.count)  # spreadsheets write the one of their locale
            reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
            columns = [name.strip() for name in next(reader)]
            if repeated := [name for name, count in Counter(columns).items() if count > 1]:
                raise UserError(f"{file}: several columns have the name {', '.join(map(repr, repeated))}")
            first = last + 1
            for values in reader:
                if len(values) not in (0, len(columns)):
                    raise UserError(
                        f"{file.name}:{first}: it has {len(values)} values, and the first line names {len(columns)} "
                        f"columns ({', '.join(columns)}). Quote values that contain {delimiter!r} or a line break"
                    )
                if any(values):
                    cells = zip(columns, values, strict=True)
                    yield f"{file.name}:{first}", Cells({name: value or None for name, value in cells})
                first = last + 1
        except csv.Error as error:
            raise UserError(
                f"{file.name}:{first}: not readable as a table ({error}). Double quotation marks in quoted values"
            ) from error
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{file.name}:{last}: not UTF-8 text: byte {byte:#x}. Save the file as UTF-8") from error


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
            record = json.loads(record.decode("utf-8-sig").rstrip("\r\n"))  # or its end is column 1 of the next line
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text: byte {error.object[error.start]:#x} at {error.start}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError:
            raise ValueError("JSON that is nested too deeply to be read") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    return record


def describe_source(source: Any, files: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the class, fields and files of an adapter as JSON values, for its `fingerprint`.

    A file is [path, size, mtime_ns, ctime_ns]: a copy may keep name, size and mtime, but not the ctime.
    """
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    if values.get("revision", "") is None:  # as in caches of earlier versions
        del values["revision"]
    content = {"source": type(source).__name__} | {
        name: dict(value)
        if isinstance(value, Mapping)
        else list(value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else value
        for name, value in values.items()
    }
    stats = [(file.resolve(), file.stat()) for file in files]
    stamps = [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]
    return {**content, "files": stamps} if stamps else content
