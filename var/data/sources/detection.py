"""Find the form of a data set's records, and read them with it."""

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, ClassVar

from var.data.parse import parse_row
from var.data.row import Row
from var.data.sources import local
from var.data.sources.forms import COMMON, IMPLICIT, NAMES, PAIRS, PROMPT, RESPONSE, ROWS, Form, find_form
from var.data.sources.hub import HubSource, Part
from var.data.sources.local import Cells, parse_record
from var.utils.errors import UserError

JSON = ("responses", "messages", "conversations", "tools", "chat_template_kwargs")  # columns that may have JSON as text
HEAD = 64  # records that show which columns exist
PYTHON = re.compile(r"\s*\[\s*\{\s*'")  # how pandas writes a list of messages to a CSV file


@dataclass
class Reader:
    """Converts the records of a data set, all of one form, and collects which columns are used."""

    form: Form
    columns: Mapping[str, str | None]
    """The data set's column of each of our names; None ignores a column of this name."""
    present: list[str]
    """Our names of the columns in the first records."""
    encoded: frozenset[str] = frozenset()
    """Columns of a CSV file that have messages as JSON."""
    used: dict[str, None] = field(default_factory=dict)
    """Columns with values that were used so far, in order."""
    unused: dict[str, None] = field(default_factory=dict)
    """Columns with values that were not used."""

    def convert(self, where: str, record: Any) -> Row:
        """Return the row in a record. A record without an id is named after its position."""
        record = rename(parse_record(record), self.columns)
        filled = {key for key, value in record.items() if value is not None}
        self._check(record, filled)
        picked = self._pick(record)
        self.used |= dict.fromkeys(name for name in record if name in filled and name in picked.values())
        self.unused |= dict.fromkeys(name for name in record if name in filled and name not in picked.values())
        values = {ours: self._decode(record, name) for ours, name in picked.items()}
        common = {key: values.pop(key) for key in COMMON if key in values}
        own = self.form.convert(values)
        row = {**common, **own}
        return parse_row(row if row.get("id") is not None else {**row, "id": where})

    def merge(self, other: "Reader") -> None:
        """Add the columns that another process has found."""
        self.used |= other.used
        self.unused |= other.unused

    def _check(self, record: Mapping[str, Any], filled: Collection[str]) -> None:
        """Raise a ValueError if a record has another form. Its texts may be null."""
        own, form = find_form(filled), self.form
        if own is form:
            return
        if own not in (None, ROWS) and (form, own) != (PAIRS, IMPLICIT):
            raise ValueError(
                f"it has the form of {own.name}, and the first record that of {form.name}. Put them into two files"
            )
        for names in form.needs:
            if not set(names) & set(record):
                raise ValueError(f"missing {self._known(names)!r}")

    def _known(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if name in self.used), names[0])

    def _pick(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Return the column of each of the form's names."""
        picked = {}
        for names in self.form.needs:
            present = [name for name in names if name in record]
            picked[names[0]] = next((name for name in present if record[name] is not None), present[0])
        others = [name for name in (*self.form.options, *COMMON) if name in record and name not in picked]
        if picked.get("prompt") != "instruction" and "input" in others:
            others.remove("input")
        if "label" in others and record.get("score") is not None:
            others.remove("label")
        return picked | {name: name for name in others if name not in PROMPT}

    def _decode(self, record: Mapping[str, Any], name: str) -> Any:
        """Return a value, with JSON in a text decoded where only lists and objects are possible."""
        value = record[name]
        if isinstance(record, Cells) and isinstance(value, str) and PYTHON.match(value):
            raise ValueError(f"{name!r} is a list in Python's notation. Write it with json.dumps, or write Parquet")
        if name in PROMPT and name not in self.encoded and _has_messages(record, name):
            raise ValueError(f"{name!r} has messages, and in the first record it has text. Put them into two files")
        try:
            if isinstance(value, str) and (name in JSON or name in self.encoded):
                value = json.loads(value)
            if name == "tools" and isinstance(value, list | tuple):
                value = [json.loads(tool) if isinstance(tool, str) else tool for tool in value]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name!r} is text that is not JSON: {error}") from error
        return value

    def describe(self) -> str:
        """Return the form and its columns in one line."""
        notes = {"label": " as the score 1 or 0", "input": " after an empty line"}
        notes |= dict.fromkeys(self.encoded, " as JSON")
        used = ", ".join((self.columns.get(name) or name) + notes.get(name, "") for name in self._in_order(self.used))
        near = {column: ours for ours, column in suggest(self.unused, self.used).items()}
        questions = {column: f" (is it {ours}?)" for column, ours in near.items()}
        left = self._in_order(self.unused)
        unused = ", ".join((name or "one without a name") + questions.get(name, "") for name in left)
        return f"{self.form.name}, from the columns {used}" + (f"; unused columns: {unused}" if unused else "")

    def _in_order(self, names: Collection[str]) -> list[str]:
        """Return columns in the order of the first records, whichever process has found them."""
        place = {name: i for i, name in enumerate(self.present)}
        return sorted(names, key=lambda name: (place.get(name, len(place)), name or ""))


def rename(record: Mapping[str, Any], columns: Mapping[str, str | None]) -> Mapping[str, Any]:
    """Return a record with our names of columns. A column that has such a name and another meaning is left out."""
    if not columns:
        return record
    theirs = set(columns.values())
    named = {ours: record[name] for ours, name in columns.items() if name is not None and name in record}
    rest = {name: value for name, value in record.items() if name not in theirs and name not in columns}
    return type(record)({**rest, **named})  # type: ignore[call-arg]


def suggest(columns: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Return the columns that may be misspelled by our name of each. known: names that have a column already."""
    free, others = [name for name in NAMES if name not in known], [name for name in columns if name not in NAMES]
    near = {name: difflib.get_close_matches(name or "", free, n=1, cutoff=0.75) for name in others}
    return {found[0]: name for name, found in near.items() if found}


def advise(columns: Collection[str]) -> str:
    """Return how to name the columns that may be misspelled; "" if there are none."""
    if not (found := suggest(columns, columns)):
        return ""
    named = ", ".join(f"{ours}: {name}" for ours, name in found.items())
    meant = " and ".join(f"{name!r} is {ours!r}" for ours, name in found.items())
    return f"If {meant}, set data.columns='{{{named}}}'."


def detect(
    records: Iterator[tuple[str, Any]],
    columns: Mapping[str, str | None],
    allowed: Mapping[Form, Mapping[str, Any]],
    advice: str,
) -> tuple[Reader | None, Iterator[tuple[str, Any]]]:
    """Return a reader for the form of the first record, and all records. None if no record can be parsed.

    Raise a UserError if the form is not allowed, with `advice`, or if `columns` names a column that does not exist.
    allowed: valid records of the allowed forms.
    """
    first = list(islice(records, HEAD))
    parsed = []
    for where, record in first:
        try:
            parsed.append((where, parse_record(record)))
        except ValueError:  # reported with the invalid rows
            continue
    everything = chain(first, records)
    if not parsed:
        return None, everything
    present = list(dict.fromkeys(name for _, record in parsed for name in record))
    check_columns(columns, present, parsed[0][0])
    renamed = [(where, rename(record, columns)) for where, record in parsed]
    forms = [(find_form([k for k, v in record.items() if v is not None]), where, record) for where, record in renamed]
    form, where, record = next((found for found in forms if found[0] is not None), (None, *renamed[0]))
    if form is None:
        options = "\n".join(f"  {shorten(valid, 200)}" for valid in allowed.values())
        example = "Name the columns, as in data.columns='{prompt: question, response: reply}'."
        raise UserError(
            f"{where}: none of the known forms has the columns {', '.join(map(repr, present))}.\n"
            f"Found: {shorten(record)}\nValid records are:\n{options}\n"
            f"{advise(present) or example}"
        )
    if form not in allowed:
        valid, advice = next(iter(allowed.values())), advise(present) or advice
        raise UserError(
            f"{where}: it has the form of {form.name}. {advice}\nFound: {shorten(record)}\nValid: {shorten(valid, 200)}"
        )
    texts = (*PROMPT, *RESPONSE, "chosen", "rejected")
    encoded = frozenset(name for name in texts if _has_messages(record, name))
    names = list(dict.fromkeys(name for _, record in renamed for name in record))
    return Reader(form, columns, names, encoded), everything


def check_columns(columns: Mapping[str, str | None], present: Collection[str], where: str) -> None:
    """Raise a UserError for names that are not ours, and for columns that do not exist."""
    if unknown := [name for name in columns if name not in NAMES]:
        raise UserError(f"data.columns: unknown names {', '.join(unknown)}. The names are {', '.join(NAMES)}")
    if missing := [name for name in columns.values() if name is not None and name not in present]:
        raise UserError(
            f"data.columns: {', '.join(map(repr, missing))} is not a column of {where.rpartition(':')[0]}. Its columns "
            f"are {', '.join(map(repr, present))}"
        )


def _has_messages(record: Mapping[str, Any], name: str) -> bool:
    """Return whether a value is the JSON text of a list of messages."""
    value = record.get(name)
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return bool(messages) and all(isinstance(message, dict) and "role" in message for message in messages)


def shorten(record: Any, longest: int = 48) -> str:
    """Return a record on one line, with long values cut."""

    def cut(text: str) -> str:
        return text if len(text) <= longest else f"{text[:longest]}…"

    if not isinstance(record, Mapping):
        return cut(record.decode(errors="replace").strip() if isinstance(record, bytes) else repr(record))
    parts = [f"{_dump(key)}: {cut(_dump(value))}" for key, value in islice(record.items(), 8)]
    return f"{{{', '.join(parts)}{', …' if len(record) > 8 else ''}}}"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


class FormSource(HubSource):
    """Base of adapters that find the form of the records, from the hub or from local files.

    A subclass is a dataclass with the fields `path`, `columns`, `name`, `split` and `revision`.
    """

    path: str
    columns: Mapping[str, str | None] | None
    name: str | None
    split: str
    revision: str | None
    allowed: ClassVar[Mapping[Form, Mapping[str, Any]]]
    """The forms that it reads, with a valid record of each."""
    advice: ClassVar[str]
    """What to do with data of another form."""
    reader: Reader | None = None
    """How the records are read, once the first ones are known."""
    parallel: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.is_local and (self.name, self.split) != (None, "train"):
            raise UserError(f"data.path={self.path} is local: data.source.name and split apply to hub sets only")
        self.check_revision()

    @property
    def parts(self) -> list[Part]:
        """The split of the hub set."""
        return [Part(self.path, self.name, self.split, revision=self.revision)]

    @property
    def is_local(self) -> bool:
        """Whether `path` is not a hub id."""
        return local.is_local(self.path)

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, record)."""
        if self.columns is not None and not isinstance(self.columns, Mapping):
            raise UserError(
                f"data.columns={self.columns}: expected our names of columns with the data's, as in "
                "data.columns='{prompt: question, response: reply}'"
            )
        columns = dict(self.columns or {})
        self.reader, records = detect(super().records(), columns, self.allowed, self.advice)
        if self.reader is not None:
            self.check_form(self.reader)
        yield from records

    def check_form(self, reader: Reader) -> None:
        """Raise a UserError if the columns leave open what they mean."""

    def row(self, where: str, record: Any) -> Row | None:
        """Return the row in a record."""
        if self.reader is None:  # the first records could not be parsed, which are errors
            parse_record(record)
            return None
        return self.reader.convert(where, record)

    @property
    def single(self) -> bool:
        """Whether each record has one response."""
        return self.reader is not None and self.reader.form.single

    @property
    def notes(self) -> Reader | None:
        """The columns that are used and not used."""
        return self.reader

    @property
    def form(self) -> str:
        """The form of the records and its columns, in one line."""
        if self.reader is None:
            return ""
        names = [file.name for file in self.files()] if self.is_local else [str(self.parts[0])]
        several = f"{', '.join(names[:3])} and {len(names) - 3} more files" if len(names) > 4 else ", ".join(names)
        return f"{several}: {self.reader.describe()}"

    def explain(self, record: Any) -> str:
        """Return a record next to a valid one."""
        form = self.reader.form if self.reader else next(iter(self.allowed))
        with suppress(ValueError):  # then it is shown as it is in the file
            record = parse_record(record)
        return f"Found: {shorten(record)}\nValid: {shorten(self.allowed[form], 200)}"
