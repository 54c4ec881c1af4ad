"""Any data set of preference pairs with chosen and rejected responses, from the hub or from local files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from var.data.row import Row
from var.data.sources.detection import FormSource
from var.data.sources.forms import IMPLICIT, PAIRS
from var.data.sources.pairs import is_empty
from var.utils.hub import download_license


@dataclass(kw_only=True)
class Preferences(FormSource):
    """Read pairs. Those with an empty prompt or response are skipped and counted, since public data sets have them.

    The responses are texts or messages. Their prompt is a column, or what both begin with.
    """

    path: str  # a hub id, or a local file or folder
    columns: Mapping[str, str | None] | None = None  # our names of columns and the data set's
    name: str | None = None  # configuration of a hub set
    split: str = "train"  # split of a hub set
    revision: str | None = None  # commit or tag of a hub set

    allowed: ClassVar = {form: form.example for form in (PAIRS, IMPLICIT)}
    advice = "Use data=files, or name the columns as in data.columns='{chosen: better, rejected: worse}'."

    @property
    def license(self) -> str | None:
        """The license in the card of the hub set, or None if it is not known here."""
        return None if self.is_local else download_license(self.path, None, "dataset")

    def row(self, where: str, record: Any) -> Row | None:
        """Return a pair, the chosen response first."""
        row = super().row(where, record)
        return None if row is None or is_empty(row) else row
