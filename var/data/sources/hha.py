"""HHA: test sets of HH-RLHF with scores of a reward model, published with LoL-RL (Baheti et al., arXiv 2305.14718).

Built from HH-RLHF (license MIT): four test sets, of which harmless_base has 2,312 pairs, helpful_base 2,354 and
helpful_online 1,135, and a development set of 280 pairs. In nearly all of it a turn ends at its first blank line, so a
list of HH-RLHF is truncated after "like this:". The chosen response has the higher score in 56 to 66 % of the pairs.
docs/data.md says where to get the files.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from var.data.messages import Message
from var.data.row import Row
from var.data.sources import local
from var.data.sources.pairs import make_pair
from var.utils.errors import UserError
from var.utils.files import make_file_name

SUBSETS = ("harmless_base", "helpful_base", "helpful_online", "helpful_rejection")
ROLES = {"<|prompter|>": "user", "<|assistant|>": "assistant"}
NAMES = ("hha_test_{}.jsonl.gz", "hha_test_{}.jsonl", "hha_{}.jsonl.gz", "hha_{}.jsonl", "{}.jsonl", "{}.json")
BAD = ("hha_bad_test_indices.json", "bad_test_indices.json")
PUBLISHED = {  # files without compression, as git names their content, at commit 10f66e9 of abaheti95/LoL-RL
    "7943865a30eb54d8f8e1e966cbc7c4ac3e30ff9d",  # data/hh_test/harmless_base.json
    "ee69724ff12e8878c9d1afeb59d82151a1be7387",  # data/hh_test/helpful_base.json
    "762821c6706d1aa005227fbca05ab11d2044c03f",  # data/hh_test/helpful_online.json
    "171b48637e6671fc0978052814c60120b32bfc5e",  # data/hh_test/helpful_rejection.json
    "7475e0cc70e2dec818cdf8c2cb927a7da3de2bd8",  # data/hh_dev/sampled_dev.json
    "37ee2f369eb96c432d86f9c91d26354be4a99e6a",  # data/hh_test/bad_test_indices.json
}


@dataclass(frozen=True, kw_only=True)
class HHA(local.LocalSource):
    """Read pairs with their scores, the better response first.

    Bad rows, pairs with an empty response (4, 4 and 3 rows of the first three sets) and, with order=score, ties are
    skipped and counted.
    """

    license = "mit"

    folder: str  # holds hha_test_<subset>.jsonl.gz or .jsonl, or is LoL-RL's data/hh_test with <subset>.json
    subsets: tuple[str, ...] | None = None  # None: every test set in the folder; `dev` reads hha_dev
    skip_bad: bool = True  # skip the rows in LoL-RL's list of bad rows, by position from 0
    order: Literal["chosen", "score"] = "chosen"  # what makes a response the better one: people, or the score

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, (subset, position, line)), or (where, None) for a bad row."""
        bad = self._read_bad_rows()
        for subset, file in self._find_files().items():
            skipped = set(bad.get(f"{subset}.json", ()))
            for position, (where, line) in enumerate(local.read_records([file])):
                yield where, None if position in skipped else (subset, position, line)

    def row(self, where: str, record: tuple[str, int, Any] | None) -> Row | None:
        """Return a pair with its scores."""
        if record is None:
            return None
        subset, position, line = record
        value = local.parse_record(line)
        first, second = (parse_turns(prefix) for prefix in value["prefix"])
        if first != second:
            raise ValueError("the two responses have different prefixes")
        texts, rewards, best = value["suffix"], value["reward"], value["sft_index"]
        if len(texts) != 2 or len(rewards) != 2 or best not in (0, 1):
            raise ValueError(f"'suffix' and 'reward' must have two items and 'sft_index' be 0 or 1, got {best!r}")
        if self.order == "score":
            if rewards[0] == rewards[1]:
                return None
            best = int(rewards[1] > rewards[0])
        scores = (float(rewards[best]), float(rewards[1 - best]))
        row = make_pair(f"{subset}-{position}", first, texts[best], texts[1 - best], scores)
        return None if row is None else replace(row, subset=subset)

    def files(self) -> list[Path]:
        """Return the file of each subset, and the list of bad rows if it is used."""
        return [*self._find_files().values(), *([self._find_bad_file()] if self.skip_bad else [])]

    @property
    def form(self) -> str:
        """Whether the files are the published ones, in one line."""
        changed = [file.name for file in self.files() if hash_blob(file) not in PUBLISHED]
        return f"not as LoL-RL published them: {', '.join(changed)}" if changed else "LoL-RL's files, as published"

    def _find_files(self) -> dict[str, Path]:
        """Return the file of each subset."""
        folder = Path(self.folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"{self.folder}: not a folder. Set `data.folder=` to the folder of {NAMES[0]}")
        wanted = SUBSETS if self.subsets is None else self.subsets
        if outside := [subset for subset in wanted if make_file_name(subset) != subset]:
            raise UserError(f"data.source.subsets: expected names such as {SUBSETS[0]}, got {outside[0]!r}")
        options = {subset: [folder / name.format(subset) for name in NAMES] for subset in wanted}
        found = {s: next((file for file in files if file.is_file()), None) for s, files in options.items()}
        present = {subset: file for subset, file in found.items() if file is not None}
        if not present or (self.subsets is not None and len(present) < len(found)):
            missing = ", ".join(NAMES[0].format(s) for s in wanted if s not in present)
            raise UserError(f"{self.folder}: missing {missing}. Set `data.folder=` or `data.source.subsets=`")
        return present

    def _find_bad_file(self) -> Path:
        for name in BAD:
            if (file := Path(self.folder).expanduser() / name).is_file():
                return file
        raise UserError(
            f"{self.folder}: missing {BAD[0]}, LoL-RL's list of bad rows. Put it there, or keep these rows "
            "with data.source.skip_bad=false"
        )

    def _read_bad_rows(self) -> dict[str, list[int]]:
        return json.loads(self._find_bad_file().read_text()) if self.skip_bad else {}


def hash_blob(file: Path) -> str:
    """Return the name that git gives to the content of a file, without its compression."""
    content = file.read_bytes()
    if file.suffix == ".gz":
        content = gzip.decompress(content)
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def parse_turns(prefix: list[str]) -> list[Message]:
    """Return the messages of `<|prompter|>…` and `<|assistant|>…`, without the empty turn that the response fills."""
    found = []
    for text in prefix:
        mark = next((mark for mark in ROLES if text.startswith(mark)), None)
        if mark is None:
            raise ValueError(f"a turn must begin with {' or '.join(ROLES)}, got {text[:40]!r}")
        found.append({"role": ROLES[mark], "content": text.removeprefix(mark).strip()})
    if not found or found[-1] != {"role": "assistant", "content": ""}:
        raise ValueError("the last turn of 'prefix' must be an empty <|assistant|>")
    return found[:-1]
