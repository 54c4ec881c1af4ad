"""Rows: prompts with their responses, checked once, stored as an Arrow file and read by memory map."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from var.data.messages import prompt_content, restore_prompt
from var.data.row import FACTS, Response, Row, state_facts
from var.data.stored import map_array
from var.utils.errors import Problems
from var.utils.files import atomic, replacing
from var.utils.provenance import hash_content, hash_file

CHUNK = 1000  # rows that are decoded or written together
FORMAT = 9  # increase it when an adapter or Row changes the rows of an unchanged source


TEXT, NUMBER, FLAG = datasets.Value("string"), datasets.Value("float64"), datasets.Value("bool")
RESPONSE = {
    "text": TEXT, "score": NUMBER, "weight": NUMBER, "source": TEXT, "finished": FLAG,
    "ids": datasets.List(datasets.Value("int32")), "message": TEXT,
}  # fmt: skip
FEATURES = datasets.Features(
    {
        "id": TEXT,
        "prompt": TEXT,
        "responses": datasets.List(RESPONSE),
        "ordered": FLAG,
        "answer": TEXT,
        "subset": TEXT,
        "sampling": TEXT,
    }
)


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, on disk."""

    table: datasets.Dataset  # columns as in FEATURES; prompts and further keys of messages as JSON
    facts: np.ndarray  # [n] of FACTS
    key: str  # hash of the content
    left_out: int = 0  # number of records that the adapter skipped
    merged: int = 0  # number of records that became a further response of an earlier record's row
    form: str = ""  # what the adapter took the records for
    _decoded: dict[int, Row] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def keys(self) -> np.ndarray:
        """[n] S16, the content hash of each row's prompt."""
        return self.facts["prompt"]

    @property
    def description(self) -> str:
        """What the adapter took the records for, in one line; empty if it did not have to find out."""
        joined = f", {self.merged} records joined to rows of the same prompt" if self.merged else ""
        return f"{self.form}; {len(self)} rows{joined}" if self.form else ""

    def list_responses(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the row [N] of each response and its index in it [N], row by row."""
        size = self.facts["responses"]
        row = np.repeat(np.arange(len(self)), size)
        return row, np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)

    def texts(self, name: Literal["id", "answer", "subset"]) -> Iterator[str | None]:
        """Yield a text of each row, without decoding the others."""
        for part in self.table.select_columns([name]).with_format("arrow").iter(10_000):
            yield from part[name].to_pylist()

    def numbers(self, name: Literal["score", "weight"]) -> np.ndarray:
        """Return [N] float64 of all responses, row by row, NaN for those without one."""
        parts = [pc.fill_null(pc.struct_field(responses, name), math.nan) for responses in self._responses()]
        return np.concatenate([part.to_numpy() for part in parts]) if parts else np.empty(0)

    def _responses(self) -> Iterator[pa.Array]:
        """Yield the responses of all rows, in parts."""
        for part in self.table.select_columns(["responses"]).with_format("arrow").iter(10_000):
            yield pc.list_flatten(part["responses"]).combine_chunks()

    @cached_property
    def labels(self) -> str:
        """A hash of what training reads of the rows besides text: scores, weights, pairs' orders, answers."""
        digest = hashlib.sha256()
        for name in ("score", "weight"):
            digest.update(self.numbers(name).tobytes())
        digest.update(self.facts["ordered"].tobytes())
        for part in self.table.select_columns(["answer"]).with_format("arrow").iter(10_000):
            digest.update(repr(part["answer"].to_pylist()).encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        """Return a row. The last few are cached, since callers ask for a row once per response."""
        if (row := self._decoded.get(int(index))) is None:
            if len(self._decoded) >= 16:
                self._decoded.clear()
            row = self._decoded[int(index)] = _load_row(self.table[int(index)])
        return row

    def read(self, indices: range | np.ndarray) -> list[Row]:
        """Return the rows at these indices, which are decoded together."""
        columns = self.table[indices]
        return [_load_row(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]

    def __iter__(self) -> Iterator[Row]:
        for begin in range(0, len(self), CHUNK):
            yield from self.read(range(begin, min(begin + CHUNK, len(self))))

    def select(self, indices: Any) -> "Rows":
        """Return the rows at these indices."""
        key = hash_content(self.key, hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()).hex()
        return Rows(self.table.select(indices), self.facts[indices], key)

    def head(self, limit: int | None) -> "Rows":
        """Return the first `limit` rows, or all if it is None."""
        return self if limit is None or limit >= len(self) else self.select(np.arange(limit))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        datasets.concatenate_datasets([part.table for part in parts]), np.concatenate([part.facts for part in parts]),
        hash_content(*(part.key for part in parts)).hex(), sum(part.left_out for part in parts),
    )  # fmt: skip


def _dump_row(row: Row) -> dict[str, Any]:
    """Return a row as a record of a table."""
    record = {name: getattr(row, name) for name in ("id", "ordered", "answer", "subset", "sampling")}
    responses = [{**vars(response), "message": _dump(dict(response.message))} for response in row.responses]
    return {**record, "prompt": _dump(prompt_content(row.prompt)), "responses": responses}


_dump = json.JSONEncoder(ensure_ascii=False).encode


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Return rows as a table."""
    return pa.Table.from_pylist([_dump_row(row) for row in rows], schema=FEATURES.arrow_schema)


def _load_row(record: Mapping[str, Any]) -> Row:
    """Return the row of `_dump_row`."""
    responses = []
    for values in record["responses"]:
        ids, message = values["ids"], {} if values["message"] == "{}" else json.loads(values["message"])
        responses.append(Response(**{**values, "ids": None if ids is None else tuple(ids), "message": message}))
    return Row(**{**record, "prompt": restore_prompt(json.loads(record["prompt"])), "responses": tuple(responses)})


def load(target: Path, facts: Mapping[str, Any] = {}) -> Rows:
    """Return the rows that `write` left in a folder.

    facts: further fields of `Rows`, such as left_out. The key is computed if it is not among them.
    """
    fields = dict(facts) if "key" in facts else {"key": hash_file(target / "rows.arrow"), **facts}
    return Rows(datasets.Dataset.from_file(str(target / "rows.arrow")), map_array(target / "facts.npy"), **fields)


def in_parts(rows: Iterable[Row]) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yield rows as tables with their facts [n] of FACTS, CHUNK rows at a time."""
    rows = iter(rows)
    while part := list(islice(rows, CHUNK)):
        yield to_table(part), np.array([state_facts(row) for row in part], dtype=FACTS)


def write(rows: Iterable[Row], target: Path, problems: Problems) -> None:
    """Write rows to the folder `target`, CHUNK at a time, or raise `problems` and write nothing."""
    write_parts(in_parts(rows), target, problems)


def write_parts(parts: Iterable[tuple[pa.Table, np.ndarray]], target: Path, problems: Problems) -> None:
    """Write rows and their facts to the folder `target`, or raise `problems` and write nothing."""
    from datasets.arrow_writer import ArrowWriter

    target.mkdir(parents=True, exist_ok=True)
    found = [np.empty(0, dtype=FACTS)]
    with replacing(target / "rows.arrow", shared=True) as partial:
        with ArrowWriter(path=str(partial), features=FEATURES) as writer:
            for table, facts in parts:
                if len(table):
                    writer.write_table(table)
                    found.append(facts)
            writer.finalize()
        problems.check()
        with atomic(target / "facts.npy", "wb", shared=True) as file:
            np.save(file, np.concatenate(found))
