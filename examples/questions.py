"""A custom data set: a table with one question and its answers per line, separated by tabs."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from var.data.messages import parse_prompt
from var.data.row import Response, Row
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Rows from a .tsv file. The answers have neither scores nor an order, so a reward must rank them."""

    path: str
    """The .tsv file."""

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise UserError(
                f"data.path={self.path}: no such file. Give a .tsv file with a question and its answers per line."
            )

    def records(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the name of each record, for parse_prompt, and its cells."""
        for number, line in enumerate(Path(self.path).read_text().splitlines(), 1):
            yield f"{Path(self.path).name}:{number}", line.split("\t")

    def row(self, where: str, record: list[str]) -> Row | None:
        """Convert one record to a row. Return None to skip it; a ValueError is reported together with all others."""
        question, *answers = record
        if not answers:
            raise ValueError("no answer after the question. Separate the cells by tabs.")
        return Row(id=where, prompt=parse_prompt(question), responses=tuple(Response(text=a) for a in answers))

    def fingerprint(self) -> dict[str, Any]:
        """Return what the rows depend on. If it changes, the file is read again."""
        return {"adapter": "examples.questions", "sha256": sha256(Path(self.path).read_bytes()).hexdigest()}
