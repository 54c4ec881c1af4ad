"""OffsetBias (Park et al., arXiv 2407.06551): preference pairs that counter the biases of judges.

Hub: NCSOFT/offsetbias, 8,504 pairs in one split, license BSD-3-Clause.
"""

from dataclasses import dataclass
from typing import Any

from var.data.row import Row
from var.data.sources import local
from var.data.sources.hub import HubSource, Part
from var.data.sources.pairs import make_pair


@dataclass(frozen=True, kw_only=True)
class OffsetBias(HubSource):
    """Read `instruction`, `output_1`, `output_2` and `label`, 1 or 2, which is the better output."""

    license = "bsd-3-clause"

    path: str | None = None  # a local copy, read instead of the hub
    revision: str | None = None  # commit or tag on the hub

    expected_rows = 8_504

    @property
    def parts(self) -> list[Part]:
        """The only split."""
        return [Part("NCSOFT/offsetbias", revision=self.revision)]

    def row(self, where: str, record: Any) -> Row | None:
        """Return a pair, the output that `label` names first."""
        record = local.parse_record(record)
        label = record["label"]
        if label not in (1, 2):
            raise ValueError(f"'label' must be 1 or 2, the better output, got {label!r}")
        return make_pair(where, record["instruction"], record[f"output_{label}"], record[f"output_{3 - label}"])
