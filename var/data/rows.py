"""Rows: one prompt with its responses, whatever the data set; checked once, kept on disk, read by memory map."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np

from var.utils.errors import Problems
from var.utils.files import atomic, replacing
from var.utils.provenance import hash_content

Message = dict[str, str]


FORMAT = 4  # raised when an adapter or Row changes what the same source gives


@dataclass(frozen=True, kw_only=True)
class Response:
    """score: the data's own reward of this response, raw, in reward units. weight: for loss=weighted, unitless.
    finished: it ends where its writer ended it; a sampled one that was cut is trained without an end token.
    """

    text: str
    score: float | None = None
    weight: float | None = None
    source: str | None = None
    finished: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt and its responses.

    prompt: messages with `role` and `content`; the last one is not the assistant's.
    responses: none (a prompt alone, to be sampled), one or several.
    ordered: the responses stand in order of preference, the best one first and the worst one last.
    answer: what a programmatic reward compares with.
    subset: the part of the data set that it is of, where results are told apart by it.
    sampling: JSON, how its responses were sampled, where sample.py wrote them.
    """

    id: str
    prompt: tuple[Message, ...]
    responses: tuple[Response, ...] = ()
    ordered: bool = False
    answer: str | None = None
    subset: str | None = None
    sampling: str | None = None


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "prompt": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "responses": datasets.List(
            {
                "text": datasets.Value("string"),
                "score": datasets.Value("float64"),
                "weight": datasets.Value("float64"),
                "source": datasets.Value("string"),
                "finished": datasets.Value("bool"),
            }
        ),
        "ordered": datasets.Value("bool"),
        "answer": datasets.Value("string"),
        "subset": datasets.Value("string"),
        "sampling": datasets.Value("string"),
    }
)


class Source(Protocol):
    """An adapter of one data set. `records` reads, `row` translates; a fault in a record is a ValueError of `row`."""

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, record): where names the record for a message, as `file.jsonl:12`."""
        ...

    def row(self, where: str, record: Any) -> Row | None:
        """Translate one record; None leaves it out, and it is counted."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What the rows depend on: names, settings, files with size and time. JSON values only."""
        ...


@dataclass(frozen=True)
class Rows:
    """The rows of one data set, on disk. keys: [n] S16, each row's prompt by content. left_out: by the adapter."""

    table: datasets.Dataset
    keys: np.ndarray
    left_out: int = 0
    _decoded: dict[int, Row] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        """The last few decoded are kept: a row is asked for once a response, and decoding one decodes them all."""
        if (row := self._decoded.get(int(index))) is None:
            if len(self._decoded) >= 16:
                self._decoded.clear()
            row = self._decoded[int(index)] = from_record(self.table[int(index)])
        return row

    def __iter__(self) -> Iterator[Row]:
        return (from_record(record) for record in self.table)

    def select(self, indices: Any) -> "Rows":
        return Rows(self.table.select(indices), self.keys[indices])

    def head(self, limit: int | None) -> "Rows":
        """The first `limit` rows; None: all."""
        return self if limit is None or limit >= len(self) else self.select(np.arange(limit))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of several sets, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        datasets.concatenate_datasets([part.table for part in parts]), np.concatenate([part.keys for part in parts]),
        sum(part.left_out for part in parts),
    )  # fmt: skip


def from_record(record: Mapping[str, Any]) -> Row:
    """A Row from a table's record or from a line of our own JSONL; an unknown key or a wrong type is a ValueError."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a row is an object with id, prompt and responses, got {type(record).__name__}")
    unknown = set(record) - set(FEATURES)
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}; a row has {sorted(FEATURES)}")
    if not isinstance(record.get("id"), str):
        raise ValueError(f"'id' must be a string, got {record.get('id')!r}")
    responses, ordered = record.get("responses"), record.get("ordered")
    if not isinstance(responses, list | tuple | None):
        raise ValueError(f"'responses' must be a list, got {responses!r}")
    sampling = record.get("sampling")
    if not isinstance(ordered, bool | None):
        raise ValueError(f"'ordered' must be true or false, got {ordered!r}")
    return Row(
        id=record["id"],
        prompt=messages(record.get("prompt")),
        responses=tuple(_response(value) for value in responses or ()),
        ordered=bool(ordered),
        answer=_text(record, "answer"),
        subset=_text(record, "subset"),
        sampling=sampling if isinstance(sampling, str | None) else json.dumps(sampling, ensure_ascii=False),
    )


def _text(record: Mapping[str, Any], key: str) -> str | None:
    """Text, or a number as text. NaN, which is how a missing number is often written, would be the text `nan`."""
    value = record.get(key)
    if isinstance(value, Mapping | list | tuple | bytes) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"'{key}' must be text or a finite number, or null where there is none, got {value!r}")
    return None if value is None else str(value)


def messages(value: Any) -> tuple[Message, ...]:
    """A prompt given as text (one user turn) or as messages."""
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"'prompt' must be text or a non-empty list of messages, got {value!r}")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"a message has 'role' and 'content', both text, got {message!r}")
    if value[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with an assistant's message; the answer belongs into 'responses'")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _response(value: Any) -> Response:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise ValueError(f"a response is text or an object with 'text', got {value!r}")
    unknown = set(value) - {"text", "score", "weight", "source", "finished"}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in a response; it has text, score, weight, source, finished")
    numbers = {}
    for key in ("score", "weight"):
        number = value.get(key)
        if number is not None and (not isinstance(number, int | float) or isinstance(number, bool)):
            raise ValueError(f"'{key}' must be a number, got {number!r}")
        numbers[key] = None if number is None else float(number)
    finished, source = value.get("finished"), value.get("source")
    if not isinstance(finished, bool | None):
        raise ValueError(f"'finished' must be true or false, got {finished!r}")
    if not isinstance(source, str | None):
        raise ValueError(f"'source' must be text, got {source!r}")
    return Response(text=value["text"], source=source, finished=finished is not False, **numbers)


def find_faults(row: Row) -> list[str]:
    """What makes a row unfit whatever the loss: an empty prompt, empty responses, rewards that are not finite."""
    found = []
    texts = [row.id, row.answer, row.subset, row.sampling, *(r.source for r in row.responses)]
    texts += [*(text for m in row.prompt for text in m.values()), *(r.text for r in row.responses)]
    try:
        "".join(filter(None, texts)).encode()
    except UnicodeEncodeError as error:
        found.append(f"its text cannot be written as UTF-8: half a surrogate pair {error.object[error.start]!r}")
    if not row.prompt[-1]["content"].strip():
        found.append("its prompt is empty")
    for k, response in enumerate(row.responses):
        if not response.text.strip():
            found.append(f"response {k} is empty")
        if response.score is not None and not math.isfinite(response.score):
            found.append(f"the score of response {k} is {response.score}")
        if response.weight is not None and not (math.isfinite(response.weight) and response.weight >= 0):
            found.append(f"the weight of response {k} is {response.weight}; weights are finite and ≥ 0")
    return found


def read(source: Source, cache: Path) -> Rows:
    """All rows of `source`, checked; kept under `cache` and read from there the next time, by memory map.

    Malformed records, empty prompts and responses, NaN scores and duplicate ids are one error that names them all.
    """
    target = cache / "rows" / hash_content(FORMAT, source.identity()).hex()
    if not (target / "done.json").exists():
        problems = Problems(f"{type(source).__name__}: rows that cannot be used")
        left_out: Counter[str] = Counter()
        write(_checked(source, problems, left_out), target, problems)
        finish(target, {"left_out": left_out["rows"]})
    return load(target)


def load(target: Path) -> Rows:
    """Rows that `write` left in a folder."""
    counts = json.loads((target / "done.json").read_text())
    table = datasets.Dataset.from_file(str(target / "rows.arrow"))
    return Rows(table, np.load(target / "prompts.npy"), left_out=counts["left_out"])


def write(rows: Iterable[Row], target: Path, problems: Problems) -> None:
    """Write rows to `target` as they come; nothing stands there when there were problems."""
    from datasets.arrow_writer import ArrowWriter

    target.mkdir(parents=True, exist_ok=True)
    keys = []
    with replacing(target / "rows.arrow", shared=True) as partial:
        with ArrowWriter(path=str(partial), features=FEATURES) as writer:
            for row in rows:
                keys.append(hash_content(row.prompt))
                writer.write(asdict(row))
            writer.finalize()
        if not keys and not problems:
            problems.add("source", "it holds no row")
        problems.check()
        with atomic(target / "prompts.npy", "wb", shared=True) as file:
            np.save(file, np.array(keys, dtype="S16"))


def finish(target: Path, facts: Mapping[str, Any]) -> None:
    """Say that a folder of the cache is whole, to all processes at once: another one may be reading it."""
    with atomic(target / "done.json", shared=True) as file:
        json.dump(facts, file)


def _checked(source: Source, problems: Problems, left_out: Counter[str]) -> Iterator[Row]:
    seen: dict[bytes, str] = {}
    for where, record in source.records():
        try:
            row = source.row(where, record)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            problems.add(where, f"missing {error}" if isinstance(error, KeyError) else str(error))
            continue
        if row is None:
            left_out["rows"] += 1
            continue
        for fault in find_faults(row):
            problems.add(where, f"{fault} (row {row.id})")
        key = hash_content(row.id)
        if key in seen:
            problems.add(where, f"id {row.id!r} is also the id of {seen[key]}")
        seen[key] = where
        if not problems:  # else nothing will stand, and a fault may be one that cannot be written
            yield row
