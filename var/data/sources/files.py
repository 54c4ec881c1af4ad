"""Our own rows as JSON lines (.jsonl, .jsonl.gz) or Parquet: one file or a folder of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var.data.rows import Row, from_record
from var.data.sources import local


@dataclass(frozen=True, kw_only=True)
class Files:
    """path: a file or a folder. Read record by record, so a set larger than memory will do.

    A record is a Row: prompt (text or messages), responses (text or text, score, weight, source), ordered, answer.
    One without `id` is called after its place, `file.jsonl:12`.
    """

    path: str

    def records(self) -> Iterator[tuple[str, Any]]:
        return local.records(self._files())

    def row(self, where: str, record: Any) -> Row:
        record = local.parse(record)
        return from_record(record if record.get("id") is not None else {**record, "id": where})

    def identity(self) -> Mapping[str, Any]:
        return {**local.settings(self), "files": local.stamps(self._files())}

    def _files(self) -> list[Path]:
        return local.listed(self.path, "data.path")
