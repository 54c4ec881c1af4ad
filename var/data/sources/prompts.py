"""Prompts without responses, which the model samples: a text file with one prompt per line, or records."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from var.data.row import Row
from var.data.sources import local
from var.data.sources.detection import FormSource
from var.data.sources.forms import MESSAGES, ROWS


@dataclass(kw_only=True)
class Prompts(FormSource):
    """Read prompts. A record has `prompt` (text or messages) or `messages`, and optionally `answer` and `id`."""

    path: str  # a .txt, a file of records, a folder of these, or a hub id
    columns: Mapping[str, str | None] | None = None  # our names of columns and the data set's
    name: str | None = None  # configuration of a hub set
    split: str = "train"  # split of a hub set
    revision: str | None = None  # commit or tag of a hub set

    suffixes = (".txt", *local.SUFFIXES)
    allowed: ClassVar = {
        ROWS: {"prompt": "What is 2 + 2?", "answer": "4"},
        MESSAGES: {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"},
    }
    advice = "Use data=files; data.responses=sampled ignores its responses."

    def read(self, files: list[Path]) -> Iterator[tuple[str, Any]]:
        """Yield (where, record) of all files. A line of a text file is a prompt."""
        for file in files:
            if not file.name.endswith(".txt"):
                yield from local.read_records([file])
                continue
            for where, line in local.read_lines(file):
                yield where, {"prompt": line.decode(errors="surrogateescape").strip()}

    def row(self, where: str, record: Any) -> Row | None:
        """Return a row without responses."""
        row = super().row(where, record)
        if row is not None and row.responses:
            raise ValueError(f"it has responses. {self.advice}")
        return row
