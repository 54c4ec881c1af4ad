"""Any preference set in chosen and rejected form: from the hub, or local JSON lines or Parquet."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from var.data.rows import Row
from var.data.sources import hub, local
from var.data.sources.pairs import pair
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """path: a hub id (`name` its configuration), or a local file or folder. The other fields name columns.

    chosen, rejected: text, with the prompt in its own column; or messages that end in the answer and begin with the
    prompt, the same in both. Messages of the answer alone take the prompt column. score_*: rewards, if the set has any.
    Left out and counted: pairs with an empty prompt or answer.
    """

    path: str
    name: str | None = None
    split: str = "train"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    score_chosen: str | None = None
    score_rejected: str | None = None

    def __post_init__(self) -> None:
        if local.is_local(self.path) and (self.name, self.split) != (None, "train"):
            raise UserError(f"data.path={self.path} is local: data.source.name and split choose from a hub set only")
        if (self.score_chosen is None) != (self.score_rejected is None):
            raise UserError("set data.source.score_chosen and score_rejected both, or neither")

    def records(self) -> Iterator[tuple[str, Any]]:
        if local.is_local(self.path):
            return local.records(local.listed(self.path, "data.path"))
        return hub.records(self.path, self.name, self.split)

    def row(self, where: str, record: Any) -> Row | None:
        record = local.parse(record)
        (before, chosen), (other, rejected) = (_split(record[key], key) for key in (self.chosen, self.rejected))
        if before != other:
            raise ValueError(f"{self.chosen!r} and {self.rejected!r} differ before their last message")
        prompt = before or record[self.prompt]
        scores = tuple(None if key is None else float(record[key]) for key in (self.score_chosen, self.score_rejected))
        return pair(where, prompt, chosen, rejected, (scores[0], scores[1]))

    def identity(self) -> Mapping[str, Any]:
        if local.is_local(self.path):
            return {**local.settings(self), "files": local.stamps(local.listed(self.path, "data.path"))}
        return {**local.settings(self), "fingerprint": hub.fingerprint(self.path, self.name, self.split)}


def _split(value: Any, key: str) -> tuple[list[Any], Any]:
    """(messages before the answer, the answer's text)."""
    if not isinstance(value, list):
        return [], value
    if not value or value[-1]["role"] != "assistant":
        raise ValueError(f"{key!r} must end with an assistant's message")
    return value[:-1], value[-1]["content"]
