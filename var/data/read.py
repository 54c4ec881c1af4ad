"""Read a source: check its rows once, and store them. Problems of all records are reported together."""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from var.data.check import INVALID, Checked, check_records
from var.data.row import Row
from var.data.rows import CHUNK, FORMAT, Rows, load, write, write_parts
from var.data.stored import make
from var.utils.errors import Problems
from var.utils.processes import map_in_order
from var.utils.provenance import hash_content, hash_file

ALONE = 20  # chunks of records that this process checks before it starts others, which takes about a second


class Source(Protocol):
    """An adapter of one data set."""

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, record). `where` names the record in messages, such as `file.jsonl:12`."""
        ...

    def row(self, where: str, record: Any) -> Row | None:
        """Convert a record to a row. None skips and counts it; a ValueError describes an invalid record."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the rows depend on as JSON values: names, settings, files with size and time."""
        ...

    # Further members are optional:
    #     form: What the records were taken for, and which of their columns are not used, in one line. It is read when
    #         all records have been.
    #     single: True if a record has one response, so that records with equal prompts become one row.
    #     explain(record): describes a record next to a valid one, for the error message about it.
    #     parallel: True if `row` depends on its arguments alone, so that copies of the source in several processes can
    #         convert the records. The copies are made after the first records have been read.
    #     notes: What `row` collects about the records, if it does, as a value that can be pickled. notes.merge(other)
    #         adds what a copy has collected.


def read(source: Source, cache: Path) -> Rows:
    """Return the checked rows of a source, from `cache` if they were read before.

    Raise one `UserError` with all problems: malformed records, empty prompts and responses, NaN scores, duplicate ids.
    """
    target = cache / "rows" / hash_content(FORMAT, source.fingerprint()).hex()
    path = getattr(source, "path", "the same data")
    return load(target, make(target, f"reads the rows of {path}", lambda: _store(source, target)))


def _store(source: Source, target: Path) -> Mapping[str, Any]:
    """Write the checked rows of a source to the folder `target`. Return the further fields of `Rows`."""
    problems = RowProblems(f"{type(source).__name__}: invalid rows", str(getattr(source, "path", "source")))
    left_out, merged = Counter[str](), 0
    with tempfile.TemporaryDirectory(dir=target) as folder:
        write_parts(_check_rows(source, problems, left_out), Path(folder), problems)
        groups = _group_records(load(Path(folder))) if getattr(source, "single", False) else []
        if merged := sum(len(group) - 1 for group in groups):
            write(_merge(load(Path(folder)), groups), target, problems)
        else:
            for name in ("rows.arrow", "facts.npy"):
                (Path(folder) / name).replace(target / name)
    key = hash_file(target / "rows.arrow")
    return {"key": key, "left_out": left_out["rows"], "merged": merged, "form": getattr(source, "form", "")}


def _group_records(rows: Rows) -> list[np.ndarray]:
    """Return the indices of records with equal prompts, answers and subsets, in the order of the first of each."""
    keys = [
        hash_content(*map(str, key)) for key in zip(rows.keys, rows.texts("answer"), rows.texts("subset"), strict=True)
    ]
    _, first, group, count = np.unique(
        np.array(keys, dtype="S16"), return_index=True, return_inverse=True, return_counts=True
    )
    groups = np.split(np.argsort(group, kind="stable"), np.cumsum(count)[:-1])
    return [groups[i] for i in np.argsort(first)]


def _merge(rows: Rows, groups: list[np.ndarray]) -> Iterator[Row]:
    """Yield one row per group, the first with the responses of all."""
    for group in groups:
        parts = rows.read(group)
        yield replace(parts[0], responses=tuple(response for part in parts for response in part.responses))


VALUES = re.compile(r"\(row .*\)$|got .*|id '.*' is also.*|\d+", re.DOTALL)  # what differs in problems of one kind


class RowProblems(Problems):
    """Problems of rows. Those that differ only in values are listed once, with the first rows that have them."""

    def __init__(self, title: str, source: str = "source") -> None:
        super().__init__(title)
        self.source = source
        """The data set, in the message that it has no rows."""
        self.kinds: dict[str, list[str]] = {}
        self.example = ""
        """The first invalid record next to a valid one."""

    @property
    def count(self) -> int:
        """The number of problems."""
        return sum(map(len, self.kinds.values()))

    def add(self, where: str, what: str) -> None:
        """Add a problem."""
        rows = self.kinds.setdefault(VALUES.sub("", what), [])
        if not rows:
            super().add(where, what)
        rows.append(where)

    def check(self, advice: str = "") -> None:
        """Raise a `UserError` if there are problems."""
        for i, (_, *others) in enumerate(self.kinds.values()):
            if others:
                more = f" and {len(others) - 3} more" if len(others) > 3 else ""
                self.found[i] += f"; also {', '.join(others[:3])}{more}"
        super().check("\n".join(filter(None, [advice, self.example])))


def _check_rows(source: Source, problems: RowProblems, left_out: Counter[str]) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yield the rows of a source with their facts, in parts, until the first problem.

    Collect all problems and count skipped records. Many records are checked by several processes.
    """
    ids, prompts = bytearray(), bytearray()  # 16 bytes of hash per row
    for part in _check_parts(source):
        left_out["rows"] += part.left_out
        ids += part.ids
        prompts += part.prompts
        problems.example = problems.example or part.example
        if not problems:  # after a problem nothing is kept
            yield from part.parts
        for where, what in part.problems:
            problems.add(where, what)
    if not ids and not problems:
        problems.add(problems.source, "it has no rows")
    if repeated := find_repeated(bytes(ids), bytes(prompts)):
        _report_repeated(source, repeated, problems)


def _check_parts(source: Source) -> Iterator[Checked]:
    """Yield the checked records of a source in parts of CHUNK."""
    records = source.records()
    parts = iter(lambda: list(islice(records, CHUNK)), [])
    if not getattr(source, "parallel", False):
        yield from (check_records(source, part) for part in parts)
        return
    for checked in map_in_order(partial(check_records, source), parts, ALONE):
        if checked.notes is not None:
            source.notes.merge(checked.notes)  # type: ignore[attr-defined]
        yield checked


def find_repeated(ids: bytes, prompts: bytes) -> dict[int, int]:
    """Return the rows whose id is an earlier row's, and that row, by their numbers.

    Args:
        ids: 16 bytes of hash per row.
        prompts: as ids, if rows with one prompt may share their id; else empty.
    """
    keys, found = np.frombuffer(ids, "V16"), dict[int, int]()
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    for at in same.tolist():
        this, first = int(order[at + 1]), int(order[at])
        first = found.get(first, first)
        if prompts[16 * this : 16 * this + 16] != prompts[16 * first : 16 * first + 16] or not prompts:
            found[this] = first
    return dict(sorted(found.items()))


def _report_repeated(source: Source, repeated: Mapping[int, int], problems: Problems) -> None:
    """Add a problem for each row with the id of an earlier one. The records are read once more to name them."""
    remedy = ". data.columns='{id: null}' names rows by their positions" if hasattr(source, "columns") else ""
    wanted, named = {*repeated, *repeated.values()}, dict[int, tuple[str, str]]()
    number = 0
    for where, record in source.records():
        try:
            row = source.row(where, record)
        except INVALID:
            continue
        if row is not None:
            if number in wanted:
                named[number] = where, row.id
            number += 1
    for this, first in repeated.items():
        where, id = named[this]
        problems.add(where, f"id {id!r} is also the id of {named[first][0]}{remedy}")
