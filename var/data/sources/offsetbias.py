"""OffsetBias (Park et al., arXiv 2407.06551): hub NCSOFT/offsetbias, 8,504 pairs, one split, BSD-3-Clause."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from var.data.rows import Row
from var.data.sources import hub, local
from var.data.sources.pairs import pair

HUB = "NCSOFT/offsetbias"


@dataclass(frozen=True, kw_only=True)
class OffsetBias:
    """instruction, output_1, output_2 and label, 1 or 2: the better one. path: a local copy instead of the hub."""

    path: str | None = None

    def records(self) -> Iterator[tuple[str, Any]]:
        return hub.records(HUB) if self.path is None else local.records(local.listed(self.path, "data.path"))

    def row(self, where: str, record: Any) -> Row | None:
        record = local.parse(record)
        label = record["label"]
        if label not in (1, 2):
            raise ValueError(f"'label' is 1 or 2, the better output, got {label!r}")
        return pair(where, record["instruction"], record[f"output_{label}"], record[f"output_{3 - label}"])

    def identity(self) -> Mapping[str, Any]:
        if self.path is None:
            return {**local.settings(self), "fingerprint": hub.fingerprint(HUB)}
        return {**local.settings(self), "files": local.stamps(local.listed(self.path, "data.path"))}
