"""The user's own rows as JSON lines (.jsonl, .jsonl.gz) or Parquet, in one file or a folder."""

from dataclasses import dataclass
from typing import Any

from var.data.rows import Row, parse_row
from var.data.sources import local


@dataclass(frozen=True, kw_only=True)
class Files(local.LocalSource):
    """Read records that have the fields of a `Row`, one by one: the data set may be larger than memory.

    A record without `id` is named after its position, such as `file.jsonl:12`.
    """

    path: str  # a file or a folder

    def row(self, where: str, record: Any) -> Row:
        """Return the row in a record."""
        record = local.parse_record(record)
        return parse_row(record if record.get("id") is not None else {**record, "id": where})
