"""HHA: HH-RLHF's test sets with a reward model's scores, as LoL-RL publishes them (Baheti et al., arXiv 2305.14718)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from var.data.rows import Message, Row
from var.data.sources import local
from var.data.sources.pairs import pair
from var.utils.errors import UserError

SUBSETS = ("harmless_base", "helpful_base", "helpful_online", "helpful_rejection")
ROLES = {"<|prompter|>": "user", "<|assistant|>": "assistant"}
NAMES = ("hha_test_{}.jsonl.gz", "hha_test_{}.jsonl", "hha_{}.jsonl.gz", "hha_{}.jsonl", "{}.jsonl", "{}.json")
BAD = ("hha_bad_test_indices.json", "bad_test_indices.json")


@dataclass(frozen=True, kw_only=True)
class HHA:
    """Pairs, the better one first; `reward` is the score. The chosen one (`sft_index`) has the higher in 56 to 66%.

    folder: holds hha_test_<subset>.jsonl.gz (or .jsonl), or LoL-RL's own data/hh_test with <subset>.json.
    subsets: null reads every one of the four test sets that is there; `dev` reads hha_dev.
    skip_bad: leave out LoL-RL's list of bad rows, by position in the file from 0.
    order: what makes a response the better one: `chosen`, by people, or the higher `score`; ties are left out there.
    Left out and counted: these, and pairs with an empty answer (4, 4 and 3 rows of the first three sets).
    In nearly all of it a turn ends at its first blank line: a list that HH-RLHF has is cut after its "like this:".
    """

    folder: str
    subsets: tuple[str, ...] | None = None
    skip_bad: bool = True
    order: Literal["chosen", "score"] = "chosen"

    def records(self) -> Iterator[tuple[str, Any]]:
        bad = self._bad()
        for subset, file in self._files().items():
            skipped = set(bad.get(f"{subset}.json", ()))
            for where, line in local.records([file]):
                position = int(where.rpartition(":")[2]) - 1
                yield where, None if position in skipped else (subset, position, line)

    def row(self, where: str, record: tuple[str, int, Any] | None) -> Row | None:
        if record is None:
            return None
        subset, position, line = record
        value = local.parse(line)
        first, second = (turns(prefix) for prefix in value["prefix"])
        if first != second:
            raise ValueError("the two responses answer different prefixes")
        texts, rewards, best = value["suffix"], value["reward"], value["sft_index"]
        if len(texts) != 2 or len(rewards) != 2 or best not in (0, 1):
            raise ValueError(f"expected two of 'suffix' and 'reward' and a 'sft_index' of 0 or 1, got {best!r}")
        if self.order == "score":
            if rewards[0] == rewards[1]:
                return None
            best = int(rewards[1] > rewards[0])
        scores = (float(rewards[best]), float(rewards[1 - best]))
        row = pair(f"{subset}-{position}", first, texts[best], texts[1 - best], scores)
        return None if row is None else replace(row, subset=subset)

    def identity(self) -> Mapping[str, Any]:
        files = list(self._files().values())
        return {**local.settings(self), "files": local.stamps([*files, self._bad_file()] if self.skip_bad else files)}

    def _files(self) -> dict[str, Path]:
        """subset → its file."""
        folder = Path(self.folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"HHA: {self.folder} is not a folder; set `data.folder=` to the one with {NAMES[0]}")
        wanted = SUBSETS if self.subsets is None else self.subsets
        options = {subset: [folder / name.format(subset) for name in NAMES] for subset in wanted}
        found = {s: next((file for file in files if file.is_file()), None) for s, files in options.items()}
        present = {subset: file for subset, file in found.items() if file is not None}
        if not present or (self.subsets is not None and len(present) < len(found)):
            missing = ", ".join(NAMES[0].format(s) for s in wanted if s not in present)
            raise UserError(f"HHA: {self.folder} lacks {missing}; set `data.folder=` or `data.source.subsets=`")
        return present

    def _bad_file(self) -> Path:
        for name in BAD:
            if (file := Path(self.folder).expanduser() / name).is_file():
                return file
        raise UserError(
            f"HHA: {self.folder} lacks LoL-RL's list of bad rows, {BAD[0]}; put it there, or keep these rows by "
            "data.source.skip_bad=false"
        )

    def _bad(self) -> dict[str, list[int]]:
        return json.loads(self._bad_file().read_text()) if self.skip_bad else {}


def turns(prefix: list[str]) -> list[Message]:
    """Messages of `<|prompter|>…` and `<|assistant|>…`; the last one is the empty turn that the response fills."""
    found = []
    for text in prefix:
        mark = next((mark for mark in ROLES if text.startswith(mark)), None)
        if mark is None:
            raise ValueError(f"a turn opens with {' or '.join(ROLES)}, got {text[:40]!r}")
        found.append({"role": ROLES[mark], "content": text.removeprefix(mark).strip()})
    if not found or found[-1] != {"role": "assistant", "content": ""}:
        raise ValueError("the last turn of 'prefix' must be an empty <|assistant|>")
    return found[:-1]
