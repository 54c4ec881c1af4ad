"""Any data set of preference pairs with chosen and rejected responses, from the hub or from local files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var.data.rows import Row
from var.data.sources import local
from var.data.sources.hub import HubSource, Part
from var.data.sources.pairs import make_pair
from var.utils.errors import UserError
from var.utils.hub import download_license


@dataclass(frozen=True, kw_only=True)
class Preferences(HubSource):
    """Read the columns of a preference set. Pairs with an empty prompt or response are skipped and counted.

    The responses are texts with the prompt in its own column, or messages that end with the answer. Messages before
    the answer are the prompt, and must be the same in both.
    """

    path: str  # a hub id, or a local file or folder
    name: str | None = None  # configuration of a hub set
    split: str = "train"  # split of a hub set
    prompt: str = "prompt"  # column of the prompt
    chosen: str = "chosen"  # column of the preferred response
    rejected: str = "rejected"  # column of the other response
    score_chosen: str | None = None  # column of the chosen response's reward
    score_rejected: str | None = None  # column of the rejected response's reward

    def __post_init__(self) -> None:
        if self.is_local and (self.name, self.split) != (None, "train"):
            raise UserError(f"data.path={self.path} is local: data.source.name and split apply to hub sets only")
        if (self.score_chosen is None) != (self.score_rejected is None):
            raise UserError("data.source: set both score_chosen and score_rejected, or neither")

    @property
    def license(self) -> str | None:
        """The license in the card of the hub set, or None if it is not known here."""
        return None if self.is_local else download_license(self.path, None, "dataset")

    @property
    def parts(self) -> Sequence[Part]:
        """The split of the hub set."""
        return [Part(self.path, self.name, self.split)]

    @property
    def is_local(self) -> bool:
        """Whether `path` is not a hub id."""
        return local.is_local(self.path)

    def row(self, where: str, record: Any) -> Row | None:
        """Return a pair, the chosen response first."""
        record = local.parse_record(record)
        (before, chosen), (other, rejected) = (_split(record[key], key) for key in (self.chosen, self.rejected))
        if before != other:
            raise ValueError(f"{self.chosen!r} and {self.rejected!r} differ before their last message")
        prompt = before or record[self.prompt]
        scores = tuple(None if key is None else float(record[key]) for key in (self.score_chosen, self.score_rejected))
        return make_pair(where, prompt, chosen, rejected, (scores[0], scores[1]))


def _split(value: Any, key: str) -> tuple[list[Any], Any]:
    """Return the messages before the answer, and the answer's text."""
    if not isinstance(value, list):
        return [], value
    if not value or value[-1]["role"] != "assistant":
        raise ValueError(f"{key!r} must end with an assistant's message")
    return value[:-1], value[-1]["content"]
