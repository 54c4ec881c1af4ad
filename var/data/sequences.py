"""Sequences: the training responses as tokens on disk, with counts of those truncated, dropped or left out."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from var.data.changes import TemplateChanges
from var.data.chat import Chat
from var.data.choice import Choice
from var.data.encode import ERRORS, FACTS, FEATURES, Encoder, encode_all
from var.data.rows import Rows
from var.data.settings import OnTemplateChange, Overlong
from var.data.stored import make, map_array
from var.utils.errors import Problems, UserError
from var.utils.files import atomic, replacing
from var.utils.provenance import hash_content

FORMAT = 3  # increase it when the tokens of unchanged rows change


@dataclass(frozen=True)
class Sequences:
    """n tokenized sequences. Tokens stay on disk; what is asked of all sequences is in arrays [n]."""

    table: datasets.Dataset  # columns as in FEATURES
    facts: np.ndarray  # [n] of FACTS, a file that is mapped into memory
    counts: Counter[str]  # sequences and rows that were truncated, dropped or left out, by reason
    content: str  # hash of all tokens, also of sequences that a subset leaves out
    ended: int  # number of all sequences that end with the template's end token
    key: str  # hash of what they are made from

    def __len__(self) -> int:
        return len(self.facts)

    @cached_property
    def row(self) -> np.ndarray:
        """[n] index of the row."""
        return np.array(self.facts["row"])

    @cached_property
    def response(self) -> np.ndarray:
        """[n] index of the response in its row."""
        return np.array(self.facts["response"])

    @cached_property
    def start(self) -> np.ndarray:
        """[n] prompt tokens."""
        return np.array(self.facts["start"], dtype=np.int64)

    @cached_property
    def length(self) -> np.ndarray:
        """[n] response tokens, including the end token."""
        return np.array(self.facts["length"], dtype=np.int64)

    @cached_property
    def group(self) -> np.ndarray:
        """[n] 0 to G-1, equal for equal prompts."""
        return np.array(self.facts["group"])

    @property
    def first(self) -> np.ndarray:
        """[G] index of the first sequence of each group."""
        return np.unique(self.group, return_index=True)[1]

    def tokens(self, index: int) -> tuple[list[int], int, str]:
        """Return the token ids, the index of the first response token, and a name for messages."""
        record = self.table[int(index)]
        return record["ids"], int(self.facts["start"][index]), record["name"]

    def column(self, name: Literal["score", "weight"]) -> np.ndarray:
        """Return [n] float64 values of the data set, NaN for responses without one."""
        return np.array(self.facts[name])


def encode(
    rows: Rows,
    choice: Choice,
    chat: Chat,
    max_length: int,
    overlong: Overlong,
    pairs: bool,
    cache: Path,
    on_template_change: OnTemplateChange = "error",
) -> Sequences:
    """Return the chosen responses as tokens. They are cached by content and read by memory map.

    If a sequence is longer than max_length, it is dropped (with its pair), truncated, or an error. If a prompt leaves
    no room for a response, its row is dropped or an error. Pairs that are one sequence, as after truncation, are left
    out. All of these are counted, as are rows that the template changes, if that is not an error.
    """
    ends = sorted(chat.end_tokens)  # raises errors of the template before the first row
    key = hash_content(
        FORMAT,
        rows.key,
        chat.template.fingerprint,
        chat.fingerprint,
        [ends, chat.size],
        hashlib.sha256(choice.row.tobytes() + choice.response.tobytes()).hexdigest(),
        [max_length, overlong, pairs],
    ).hex()
    target = cache / "sequences" / key
    encoder = Encoder(rows, chat, max_length, overlong, pairs)
    done = make(target, "tokenizes the same rows", lambda: _write(encoder, choice, on_template_change, target))
    TemplateChanges(done["changes"], done["changed_rows"]).settle(on_template_change)
    counts = Counter(done["counts"]) + choice.counts
    table = datasets.Dataset.from_file(str(target / "sequences.arrow"))
    if not len(table):
        reasons = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UserError(
            f"no sequence is left to train on ({reasons or 'no row has the responses that this loss needs'}). Check "
            "data.responses, data.max_length, and whether the loss suits the data."
        )
    return Sequences(table, map_array(target / "facts.npy"), counts, done["content"], done["ended"], key)


def _write(encoder: Encoder, choice: Choice, on_template_change: OnTemplateChange, target: Path) -> Mapping[str, Any]:
    """Tokenize the chosen responses into the folder `target`, or raise one error for all invalid rows.

    Return the counts.
    """
    from datasets.arrow_writer import ArrowWriter

    problems, counts, changes = Problems("rows that cannot be tokenized"), Counter[str](), TemplateChanges()
    ended, content, parts = 0, hashlib.sha256(), [np.empty(0, dtype=FACTS)]
    with (
        replacing(target / "sequences.arrow", shared=True) as partial,
        ArrowWriter(path=str(partial), features=FEATURES) as writer,
    ):
        for part in encode_all(encoder, choice):
            counts.update(part.counts)
            for name, found in part.changes:
                changes.add(f"row {name}", found)
            for name, error in part.errors:
                problems.add(f"row {name}", error)
            ended += part.ended
            content.update(part.content)
            if len(part.table):
                writer.write_table(part.table)
                parts.append(part.facts)
        writer.finalize()
        facts = np.concatenate(parts)
        parts.clear()  # they have the size of `facts`, which is the most of what this process holds
        if len(facts) and not ended:
            problems.add(
                "all rows",
                "every response was truncated, so none ends with the template's end token and the model would never "
                "learn to stop. Increase data.max_length, or generate.max_new_tokens for sampled responses",
            )
        advice = "Set data.overlong=drop to drop overlong rows, or increase data.max_length."
        problems.check(advice if counts[ERRORS] else "")
        if on_template_change == "error":
            changes.settle("error")
    present = np.unique(facts["row"])
    group = np.empty(len(encoder.rows), dtype=np.int64)
    group[present] = np.unique(encoder.rows.keys[present], return_inverse=True)[1]
    facts["group"] = group[facts["row"]]
    with atomic(target / "facts.npy", "wb", shared=True) as file:
        np.save(file, facts)
    return {
        "counts": {k: v for k, v in counts.items() if v}, "content": content.hexdigest()[:16], "ended": int(ended),
        "changes": changes.found[:20], "changed_rows": changes.rows,
    }  # fmt: skip
