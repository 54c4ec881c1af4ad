"""Rows: prompts with their responses, checked once, stored as an Arrow file and read by memory map."""

import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow.compute as pc

from var.data.messages import Prompt, last_text, prompt_content, restore_prompt, texts_in
from var.utils.errors import Problems
from var.utils.files import atomic, replacing
from var.utils.provenance import hash_content

FORMAT = 7  # increase it when an adapter or Row changes the rows of an unchanged source


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response to a prompt."""

    text: str
    score: float | None = None  # the data set's own reward, in reward units
    weight: float | None = None  # for loss=weighted, without a unit
    source: str | None = None  # the model or person that wrote it
    finished: bool = True  # False: sampling was truncated, so the response is trained without an end token
    ids: tuple[int, ...] | None = None  # the sampled tokens, with the end token, which are trained as they are
    message: Mapping[str, Any] = field(default_factory=dict)  # further keys of the message, such as tool_calls


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt and its responses."""

    id: str  # unique in the data set
    prompt: Prompt  # the last message is not the assistant's
    responses: tuple[Response, ...] = ()  # empty: the prompt is to be sampled
    ordered: bool = False  # the responses are in order of preference, best first
    answer: str | None = None  # the reference answer of a programmatic reward
    subset: str | None = None  # part of the data set; results are reported per subset
    sampling: str | None = None  # JSON written by sample.py: how the responses were sampled


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

    # Two members are optional. Both are read when all records have been:
    #     form: What the records were taken for, and which of their columns are not used, in one line.
    #     single: True if a record has one response, so that records with equal prompts become one row.
    # A third one, explain(record), describes a record next to a valid one, for the error message about it.


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, on disk."""

    table: datasets.Dataset  # columns as in FEATURES; prompts and further keys of messages as JSON
    keys: np.ndarray  # [n] S16, a hash of each row's prompt
    left_out: int = 0  # number of records that the adapter skipped
    merged: int = 0  # number of records that became a further response of an earlier record's row
    form: str = ""  # what the adapter took the records for
    _decoded: dict[int, Row] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def description(self) -> str:
        """What the adapter took the records for, in one line; empty if it did not have to find out."""
        joined = f", {self.merged} records joined to rows of the same prompt" if self.merged else ""
        return f"{self.form}; {len(self)} rows{joined}" if self.form else ""

    @cached_property
    def labels(self) -> str:
        """A hash of what training reads of the rows besides text: scores, weights, pairs' orders, answers."""
        digest = hashlib.sha256()
        for part in self.table.select_columns(["responses", "ordered", "answer"]).with_format("arrow").iter(10_000):
            responses = pc.list_flatten(part["responses"])
            for name in ("score", "weight"):
                numbers = pc.fill_null(pc.struct_field(responses, name), math.nan)
                digest.update(numbers.to_numpy().tobytes())
            digest.update(repr([part["ordered"].to_pylist(), part["answer"].to_pylist()]).encode())
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

    def __iter__(self) -> Iterator[Row]:
        return (_load_row(record) for record in self.table)

    def select(self, indices: Any) -> "Rows":
        """Return the rows at these indices."""
        return Rows(self.table.select(indices), self.keys[indices])

    def head(self, limit: int | None) -> "Rows":
        """Return the first `limit` rows, or all if it is None."""
        return self if limit is None or limit >= len(self) else self.select(np.arange(limit))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        datasets.concatenate_datasets([part.table for part in parts]), np.concatenate([part.keys for part in parts]),
        sum(part.left_out for part in parts),
    )  # fmt: skip


def _dump_row(row: Row) -> dict[str, Any]:
    """Return a row as a record of a table."""
    record = {name: getattr(row, name) for name in ("id", "ordered", "answer", "subset", "sampling")}
    responses = [{**vars(response), "message": _dump(dict(response.message))} for response in row.responses]
    return {**record, "prompt": _dump(prompt_content(row.prompt)), "responses": responses}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _load_row(record: Mapping[str, Any]) -> Row:
    """Return the row of `_dump_row`."""
    responses = []
    for values in record["responses"]:
        ids, message = values["ids"], json.loads(values["message"])
        responses.append(Response(**{**values, "ids": None if ids is None else tuple(ids), "message": message}))
    return Row(**{**record, "prompt": restore_prompt(json.loads(record["prompt"])), "responses": tuple(responses)})


def find_faults(row: Row) -> list[str]:
    """Return what makes a row unusable for any loss: empty or unencodable text, invalid scores or weights."""
    faults = []
    texts = [row.id, row.answer, row.subset, row.sampling, *(r.source for r in row.responses)]
    texts += texts_in([prompt_content(row.prompt), *([r.text, r.message] for r in row.responses)])
    try:
        "".join(filter(None, texts)).encode()
    except UnicodeEncodeError as error:
        faults.append(f"its text cannot be written as UTF-8: unpaired surrogate {error.object[error.start]!r}")
    if not last_text(row.prompt).strip():
        faults.append("its prompt is empty")
    for k, response in enumerate(row.responses):
        if not response.text.strip() and not response.message:
            faults.append(f"response {k} is empty")
        if response.score is not None and not math.isfinite(response.score):
            faults.append(f"the score of response {k} is {response.score}; scores must be finite")
        if response.weight is not None and not (math.isfinite(response.weight) and response.weight >= 0):
            faults.append(f"the weight of response {k} is {response.weight}; weights must be finite and ≥ 0")
    return faults


def read(source: Source, cache: Path) -> Rows:
    """Return the checked rows of a source, from `cache` if they were read before.

    Raise one `UserError` with all problems: malformed records, empty prompts and responses, NaN scores, duplicate ids.
    """
    target = cache / "rows" / hash_content(FORMAT, source.fingerprint()).hex()
    if not (target / "done.json").exists():
        problems = RowProblems(f"{type(source).__name__}: invalid rows", str(getattr(source, "path", "source")))
        left_out, merged = Counter[str](), 0
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as folder:
            write(_check_rows(source, problems, left_out), Path(folder), problems)
            groups = _group_records(load_table(Path(folder))) if getattr(source, "single", False) else []
            if merged := sum(len(group) - 1 for group in groups):
                write(_merge(load_table(Path(folder)), groups), target, problems)
            else:
                for name in ("rows.arrow", "prompts.npy"):
                    (Path(folder) / name).replace(target / name)
        counts = {"left_out": left_out["rows"], "merged": merged, "form": getattr(source, "form", "")}
        finish(target, counts)
    return load(target)


def _group_records(rows: Rows) -> list[np.ndarray]:
    """Return the indices of records with equal prompts, answers and subsets, in the order of the first of each."""
    keys = [
        hash_content(*map(str, key)) for key in zip(rows.keys, rows.table["answer"], rows.table["subset"], strict=True)
    ]
    _, first, group, count = np.unique(
        np.array(keys, dtype="S16"), return_index=True, return_inverse=True, return_counts=True
    )
    groups = np.split(np.argsort(group, kind="stable"), np.cumsum(count)[:-1])
    return [groups[i] for i in np.argsort(first)]


def _merge(rows: Rows, groups: list[np.ndarray]) -> Iterator[Row]:
    """Yield one row per group, the first with the responses of all."""
    for group in groups:
        parts = [rows[i] for i in group]
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


def load(target: Path) -> Rows:
    """Return the rows that `write` and `finish` left in a folder."""
    return replace(load_table(target), **json.loads((target / "done.json").read_text()))


def load_table(target: Path) -> Rows:
    """Return the rows that `write` left in a folder."""
    return Rows(datasets.Dataset.from_file(str(target / "rows.arrow")), np.load(target / "prompts.npy"))


def write(rows: Iterable[Row], target: Path, problems: Problems) -> None:
    """Write rows to the folder `target` one by one, or raise `problems` and write nothing."""
    from datasets.arrow_writer import ArrowWriter

    target.mkdir(parents=True, exist_ok=True)
    keys = []
    with replacing(target / "rows.arrow", shared=True) as partial:
        with ArrowWriter(path=str(partial), features=FEATURES) as writer:
            for row in rows:
                keys.append(hash_content(prompt_content(row.prompt)))
                writer.write(_dump_row(row))
            writer.finalize()
        if not keys and not problems:
            problems.add(getattr(problems, "source", "source"), "it has no rows")
        problems.check()
        with atomic(target / "prompts.npy", "wb", shared=True) as file:
            np.save(file, np.array(keys, dtype="S16"))


def finish(target: Path, counts: Mapping[str, Any]) -> None:
    """Mark a folder of the cache as complete. Other processes may be reading it."""
    with atomic(target / "done.json", shared=True) as file:
        json.dump(counts, file)


def _check_rows(source: Source, problems: RowProblems, left_out: Counter[str]) -> Iterator[Row]:
    """Yield the rows of a source until the first problem; collect all problems and count skipped records."""
    seen: dict[bytes, tuple[str, bytes]] = {}
    explain = getattr(source, "explain", lambda record: "")
    for where, record in source.records():
        try:
            row = source.row(where, record)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            problems.example = problems.example or explain(record)
            problems.add(where, f"missing {error}" if isinstance(error, KeyError) else str(error))
            continue
        if row is None:
            left_out["rows"] += 1
            continue
        for fault in find_faults(row):
            problems.example = problems.example or explain(record)
            problems.add(where, f"{fault} (row {row.id})")
        id, prompt = hash_content(row.id), hash_content(prompt_content(row.prompt))
        other, its_prompt = seen.setdefault(id, (where, prompt))
        if other != where and not (getattr(source, "single", False) and prompt == its_prompt):
            remedy = ". data.columns='{id: null}' names rows by their positions" if hasattr(source, "columns") else ""
            problems.add(where, f"id {row.id!r} is also the id of {other}{remedy}")
        if not problems:  # after a problem nothing is kept, and some faulty rows cannot be written
            yield row
