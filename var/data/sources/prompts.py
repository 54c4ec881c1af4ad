"""Prompts alone, to be sampled: a text file with one a line, or JSON lines."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var.data.rows import Row, from_record
from var.data.sources import local

SUFFIXES = (".txt", *local.LINES)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """path: .txt (a prompt a line), .jsonl or .jsonl.gz (`prompt` as text or messages; `answer`, `id`), or a folder."""

    path: str

    def records(self) -> Iterator[tuple[str, Any]]:
        for file in self._files():
            text = file.name.endswith(".txt")
            for where, line in local.records([file]):
                yield where, (line, text)

    def row(self, where: str, record: tuple[bytes, bool]) -> Row:
        line, text = record
        value = {"prompt": line.decode("utf-8-sig").strip()} if text else local.parse(line)
        if unknown := set(value) - {"id", "prompt", "answer"}:
            raise ValueError(f"unknown keys {sorted(unknown)}; a prompt has prompt, answer, id (rows: data=files)")
        return from_record(value if value.get("id") is not None else {**value, "id": where})

    def identity(self) -> Mapping[str, Any]:
        return {**local.settings(self), "files": local.stamps(self._files())}

    def _files(self) -> list[Path]:
        return local.listed(self.path, "data.path", SUFFIXES)
