"""HH-RLHF (Bai et al., arXiv 2204.05862): hub Anthropic/hh-rlhf, pairs of whole dialogues, MIT."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from var.data.rows import Message, Row
from var.data.sources import hub, local
from var.data.sources.pairs import pair
from var.utils.errors import UserError

HUB = "Anthropic/hh-rlhf"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HHA = {name: name.removesuffix("-sampled").replace("-", "_") for name in SUBSETS}  # as data=hha calls them
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class HHRLHF:
    """`chosen` and `rejected`, each `\\n\\nHuman: … \\n\\nAssistant: …`, equal but for the last turn.

    Left out and counted: pairs that differ before it, that do not alternate, or whose question or answer is empty
    (harmless-base, test: 13 of 2,312).
    path: instead of the hub a clone of it (`<subset>/<split>.jsonl.gz`), or one file, read whole.
    """

    subsets: tuple[str, ...] = SUBSETS
    split: str = "train"
    path: str | None = None

    def __post_init__(self) -> None:
        if not self.subsets or set(self.subsets) - set(SUBSETS):
            raise UserError(f"data.source.subsets are of {', '.join(SUBSETS)}, got {list(self.subsets)}")
        if self.split not in ("train", "test"):
            raise UserError(f"data.source.split is train or test, got {self.split}")
        if self._one_file() and (tuple(self.subsets), self.split) != (SUBSETS, "train"):
            raise UserError(f"data.path={self.path} is one file, read whole: leave data.source.subsets and split alone")

    def records(self) -> Iterator[tuple[str, Any]]:
        if self.path is None:
            return chain.from_iterable(hub.records(HUB, split=self.split, data_dir=name) for name in self.subsets)
        if self._one_file():
            return local.records(self._files())
        return (
            (f"{file.parent.name}/{where}", record)  # the files of all subsets have one name
            for file in self._files()
            for where, record in local.records([file])
        )

    def row(self, where: str, record: Any) -> Row | None:
        record = local.parse(record)
        chosen, rejected = dialogue(record["chosen"]), dialogue(record["rejected"])
        alternate = ["user", "assistant"] * (len(chosen) // 2)
        if chosen[:-1] != rejected[:-1] or any([turn["role"] for turn in d] != alternate for d in (chosen, rejected)):
            return None
        row = pair(where, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])
        subset = next((HHA[name] for name in SUBSETS if name in where), None)
        return None if row is None else replace(row, subset=subset)

    def identity(self) -> Mapping[str, Any]:
        if self.path is not None:
            return {**local.settings(self), "files": local.stamps(self._files())}
        prints = [hub.fingerprint(HUB, split=self.split, data_dir=name) for name in self.subsets]
        return {**local.settings(self), "fingerprint": prints}

    def _one_file(self) -> bool:
        return self.path is not None and (Path(self.path).expanduser().is_file() or self.path.endswith(local.SUFFIXES))

    def _files(self) -> list[Path]:
        assert self.path is not None
        if self._one_file():
            return local.listed(self.path, "data.path")
        places = [
            [Path(self.path, name, self.split + suffix).expanduser() for suffix in local.SUFFIXES]
            for name in self.subsets
        ]
        found = [next((file for file in options if file.is_file()), options[1]) for options in places]
        if missing := [str(file) for file in found if not file.is_file()]:
            raise UserError(
                f"missing {', '.join(missing)}; set `data.path=` to a clone of {HUB}, or choose by data.source.subsets="
            )
        return found


def dialogue(text: Any) -> list[Message]:
    """The turns of `\\n\\nHuman: … \\n\\nAssistant: …`, stripped."""
    if not isinstance(text, str) or not SPEAKER.match(text):
        raise ValueError(f"a dialogue begins with '\\n\\nHuman:', got {str(text)[:40]!r}")
    _, *parts = SPEAKER.split(text)
    return [
        {"role": ROLES[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
