"""A data set of one's own: a table with a question and its answers in each line, separated by tabs."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from var.data.rows import Response, Row, parse_prompt
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Questions:
    """path: a .tsv. Its answers have no scores and no order: a reward tells them apart."""

    path: str

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise UserError(f"data.path={self.path}: no such file; name a .tsv with a question and its answers a line")

    def records(self) -> Iterator[tuple[str, list[str]]]:
        """(where, record): where names the record in messages."""
        for number, line in enumerate(Path(self.path).read_text().splitlines(), 1):
            yield f"{Path(self.path).name}:{number}", line.split("\t")

    def row(self, where: str, record: list[str]) -> Row | None:
        """One record as a row; None leaves it out, a ValueError is told with all others."""
        question, *answers = record
        if not answers:
            raise ValueError("no answer after the question; separate them by tabs")
        return Row(id=where, prompt=parse_prompt(question), responses=tuple(Response(text=a) for a in answers))

    def identity(self) -> dict[str, Any]:
        """What the rows depend on: with another content they are read anew."""
        return {"adapter": "examples.questions", "sha256": sha256(Path(self.path).read_bytes()).hexdigest()}
