"""Prompts without responses, which the model samples: a text file with one prompt per line, or JSON lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from var.data.rows import Row, parse_row
from var.data.sources import local


@dataclass(frozen=True, kw_only=True)
class Prompts(local.LocalSource):
    """Read prompts. A JSON object has `prompt` (text or messages) and optionally `answer` and `id`."""

    path: str  # a .txt, .jsonl or .jsonl.gz, or a folder of these

    suffixes = (".txt", *local.LINES)

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, (line, whether it is plain text))."""
        for file in self.files():
            for where, line in local.read_records([file]):
                yield where, (line, file.name.endswith(".txt"))

    def row(self, where: str, record: tuple[bytes, bool]) -> Row:
        """Return a row without responses."""
        line, is_text = record
        value = {"prompt": line.decode("utf-8-sig").strip()} if is_text else local.parse_record(line)
        if unknown := set(value) - {"id", "prompt", "answer"}:
            raise ValueError(
                f"unknown keys {sorted(unknown)}; a prompt has prompt, answer, id. Use data=files for rows"
            )
        return parse_row(value if value.get("id") is not None else {**value, "id": where})
