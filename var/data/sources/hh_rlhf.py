"""HH-RLHF (Bai et al., arXiv 2204.05862): pairs of dialogues about helpfulness and harmlessness, ranked by people.

Hub: Anthropic/hh-rlhf, 160,800 training and 8,552 test pairs in four subsets, license MIT.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from var.data.messages import Message
from var.data.row import Row
from var.data.sources import local
from var.data.sources.hub import HubSource, Part
from var.data.sources.pairs import make_pair
from var.utils.errors import UserError

HUB = "Anthropic/hh-rlhf"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HHA = tuple(name.removesuffix("-sampled").replace("-", "_") for name in SUBSETS)  # the names in data=hha
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class HHRLHF(HubSource):
    r"""Split the dialogues `chosen` and `rejected` into their common prompt and two responses.

    A dialogue is `\n\nHuman: … \n\nAssistant: …`. Pairs are skipped and counted if they differ before the last turn,
    do not alternate, or end in an empty question or answer (13 of 2,312 in the test split of harmless-base).
    `path` is a clone of the hub's repository (`<subset>/<split>.jsonl.gz`), or a single file, read completely.
    """

    license = "mit"
    parallel: ClassVar[bool] = True

    subsets: tuple[str, ...] = SUBSETS
    split: str = "train"  # train or test
    path: str | None = None  # see above; None: read the hub
    revision: str | None = None  # commit or tag on the hub

    def __post_init__(self) -> None:
        if not self.subsets or set(self.subsets) - set(SUBSETS):
            raise UserError(f"data.source.subsets: expected some of {', '.join(SUBSETS)}, got {list(self.subsets)}")
        if self.split not in ("train", "test"):
            raise UserError(f"data.source.split: expected train or test, got {self.split}")
        if self._is_file() and (tuple(self.subsets), self.split) != (SUBSETS, "train"):
            raise UserError(f"data.path={self.path} is one file. Do not set data.source.subsets and split with it")

    @property
    def parts(self) -> Sequence[Part]:
        """One part per subset."""
        return [Part(HUB, split=self.split, data_dir=name, revision=self.revision) for name in self.subsets]

    def files(self) -> list[Path]:
        """Return the single file, or the file of each subset in the clone."""
        if self.path is None or self._is_file():
            return super().files()
        options = [
            [Path(self.path, name, self.split + suffix).expanduser() for suffix in local.SUFFIXES]
            for name in self.subsets
        ]
        found = [next((file for file in files if file.is_file()), files[1]) for files in options]
        if missing := [str(file) for file in found if not file.is_file()]:
            raise UserError(
                f"missing {', '.join(missing)}. Set `data.path=` to a clone of {HUB}, or set data.source.subsets"
            )
        return found

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, record). `where` starts with the subset, since the files of a clone have the same name."""
        if self.path is None or self._is_file():
            return super().records()
        return (
            (f"{file.parent.name}/{where}", record)
            for file in self.files()
            for where, record in local.read_records([file])
        )

    def row(self, where: str, record: Any) -> Row | None:
        """Return a pair, the chosen response first."""
        record = local.parse_record(record)
        chosen, rejected = parse_dialogue(record["chosen"]), parse_dialogue(record["rejected"])
        roles = ["user", "assistant"] * (len(chosen) // 2)
        if chosen[:-1] != rejected[:-1] or any([turn["role"] for turn in d] != roles for d in (chosen, rejected)):
            return None
        row = make_pair(where, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])
        return None if row is None else replace(row, subset=self._find_subset(where))

    def _find_subset(self, where: str) -> str | None:
        """Return the name of a record's subset in data=hha. That of a single file is in its name or its folder's."""
        names = where, Path(self.path or "").absolute().parent.name
        return next((subset for name in names for subset in HHA if subset in name.replace("-", "_")), None)

    def _is_file(self) -> bool:
        return self.path is not None and (Path(self.path).expanduser().is_file() or self.path.endswith(local.SUFFIXES))


def parse_dialogue(text: Any) -> list[Message]:
    r"""Return the turns of `\n\nHuman: … \n\nAssistant: …`, without surrounding spaces."""
    if not isinstance(text, str) or not SPEAKER.match(text):
        raise ValueError(f"a dialogue must begin with '\\n\\nHuman:', got {str(text)[:40]!r}")
    _, *parts = SPEAKER.split(text)
    return [
        {"role": ROLES[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
