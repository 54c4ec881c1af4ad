"""Sequences: the training responses as tokens on disk, with counts of those truncated, dropped or left out."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from var.data.changes import TemplateChanges
from var.data.chat import Chat, Encoded
from var.data.messages import prompt_content
from var.data.rows import Rows, finish
from var.data.settings import OnTemplateChange, Overlong
from var.utils.errors import Problems, UserError
from var.utils.files import replacing
from var.utils.provenance import hash_content

FORMAT = 2  # increase it when the tokens of unchanged rows change
Selection = Literal["chosen", "both", "best", "all"]
FEATURES = datasets.Features(
    {
        "row": datasets.Value("int64"),
        "response": datasets.Value("int32"),
        "start": datasets.Value("int32"),
        "ids": datasets.List(datasets.Value("int32")),
        "prompt_key": datasets.Value("binary"),
        "score": datasets.Value("float64"),
        "weight": datasets.Value("float64"),
        "name": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class Choice:
    """The training responses. The two responses of a pair are adjacent, the better one first."""

    row: np.ndarray  # [n] index of the row
    response: np.ndarray  # [n] index of the response in its row
    counts: Counter[str] = field(default_factory=Counter)  # rows left out, by reason


@dataclass(frozen=True)
class Sequences:
    """n tokenized sequences. Tokens are on disk, the arrays [n] in memory."""

    table: datasets.Dataset  # columns as in FEATURES
    row: np.ndarray  # index of the row
    start: np.ndarray  # prompt tokens
    length: np.ndarray  # response tokens, including the end token
    group: np.ndarray  # 0 to G-1, equal for equal prompts
    counts: Counter[str]  # sequences and rows that were truncated, dropped or left out, by reason
    content: str  # hash of all tokens, also of sequences that a subset leaves out
    ended: int  # number of all sequences that end with the template's end token

    def __len__(self) -> int:
        return len(self.row)

    @property
    def first(self) -> np.ndarray:
        """[G] index of the first sequence of each group."""
        return np.unique(self.group, return_index=True)[1]

    def tokens(self, index: int) -> tuple[list[int], int, str]:
        """Return the token ids, the index of the first response token, and a name for messages."""
        record = self.table[int(index)]
        return record["ids"], record["start"], record["name"]

    def column(self, name: Literal["score", "weight"]) -> np.ndarray:
        """Return [n] float64 values of the data set, NaN for responses without one."""
        return np.array([np.nan if v is None else v for v in self.table[name]], dtype=np.float64)


def choose(rows: Rows, responses: Selection, rewards: list[np.ndarray] | None = None) -> Choice:
    """Choose the responses to train on.

    Args:
        rows: All rows.
        responses: `all`; `chosen`, the first of an ordered row; `best`, the one with the highest reward; or `both`, the
            first and the last of an ordered row, and those with the highest and the lowest reward of another row.
            If these rewards are equal, the row is left out and counted.
        rewards: The rewards of each row's responses, if `needs_rewards`.
    """
    problems = Problems(f"data.responses={responses} does not fit these rows")
    row, response, counts = list[int](), list[int](), Counter[str]()
    for i, item in enumerate(rows):
        n = len(item.responses)
        picked: list[int]
        if not n:
            counts["rows without a response"] += 1
            continue
        if responses == "all":
            picked = list(range(n))
        elif responses == "chosen":
            if not item.ordered:
                problems.add(f"row {item.id}", "its responses are not ordered by preference. Set data.responses=best")
            picked = [0]
        elif responses == "both" and n < 2:
            counts["rows with fewer than two responses"] += 1
            continue
        elif responses == "both" and item.ordered:
            picked = [0, n - 1]
        elif rewards is None:
            raise UserError(f"data.responses={responses} needs the rewards of all responses. Pass `rewards`")
        else:
            picked = [int(rewards[i].argmax())]
            if responses == "both":
                if rewards[i].max() == rewards[i].min():
                    counts["rows whose responses all have the same reward"] += 1
                    continue
                picked.append(int(rewards[i].argmin()))
        row.extend([i] * len(picked))
        response.extend(picked)
    problems.check()
    return Choice(np.array(row, dtype=np.int64), np.array(response, dtype=np.int64), counts)


def needs_rewards(rows: Rows, responses: Selection) -> bool:
    """Return whether `choose` needs rewards for these rows."""
    return responses == "best" or (responses == "both" and not all(rows.table["ordered"]))


def fit(encoded: Encoded, max_length: int, overlong: Overlong) -> list[int]:
    """Return the tokens of a sequence that train and those of its prompt, or an empty list if it is dropped.

    A truncated response has no end token, so that it does not teach to stop. Raise a ValueError if the sequence is too
    long to be used.
    """
    if len(encoded.ids) <= max_length:
        return encoded.ids
    if overlong == "drop":
        return []
    full = encoded.start >= max_length  # no room for a response
    if overlong == "error" or full:
        what = f"its prompt alone has {encoded.start} tokens" if full else f"it has {len(encoded.ids)} tokens"
        raise ValueError(f"{what}; data.max_length={max_length}")
    return encoded.ids[:max_length]


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
        rows.table._fingerprint,
        chat.template.fingerprint,
        chat.fingerprint,
        [ends, chat.size],
        hashlib.sha256(choice.row.tobytes() + choice.response.tobytes()).hexdigest(),
        [max_length, overlong, pairs],
    ).hex()
    target = cache / "sequences" / key
    if not (target / "done.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        _write(rows, choice, chat, max_length, overlong, pairs, on_template_change, target)
    done = json.loads((target / "done.json").read_text())
    TemplateChanges(done["changes"], done["changed_rows"]).settle(on_template_change)
    counts = Counter(done["counts"]) + choice.counts
    table = datasets.Dataset.from_file(str(target / "sequences.arrow"))
    if not len(table):
        reasons = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UserError(
            f"no sequence is left to train on ({reasons or 'no row has the responses that this loss needs'}). Check "
            "data.responses, data.max_length, and whether the loss suits the data."
        )
    start, ids = np.array(table["start"]), table.data.column("ids")
    total = np.concatenate([chunk.value_lengths().to_numpy() for chunk in ids.chunks])
    keys = np.array([bytes(k) for k in table["prompt_key"]], dtype="S16")
    group = np.unique(keys, return_inverse=True)[1]
    row = np.array(table["row"])
    return Sequences(table, row, start, total - start, group, counts, done["content"], done["ended"])


def _write(
    rows: Rows,
    choice: Choice,
    chat: Chat,
    max_length: int,
    overlong: Overlong,
    pairs: bool,
    on_template_change: OnTemplateChange,
    target: Path,
) -> None:
    """Tokenize the chosen responses into the folder `target`, or raise one error for all invalid rows."""
    from datasets.arrow_writer import ArrowWriter

    problems, counts, changes = Problems("rows that cannot be tokenized"), Counter[str](), TemplateChanges()
    size, ended, total = 2 if pairs else 1, 0, 0
    content = hashlib.sha256()

    def tokenize(index: int, k: int) -> dict[str, Any] | None:
        """Return one record of the table, or None if it is dropped."""
        row, response = rows[index], rows[index].responses[k]
        name = f"{row.id}#{k}"
        try:
            encoded = chat.encode_response(row.prompt, response)
        except ValueError as error:
            problems.add(f"row {name}", str(error))
            return None
        changes.add(f"row {name}", encoded.changes)
        counts["sequences changed by the template"] += bool(encoded.changes)
        counts["sequences with control tokens, encoded as text"] += encoded.control
        if response.ids is not None and encoded.ids[encoded.start :] != list(response.ids):
            counts["sampled by another tokenizer, so read as text"] += 1
        try:
            ids = fit(encoded, max_length, overlong)
        except ValueError as error:
            problems.add(f"row {name}", str(error))
            counts["sequences that are errors"] += 1
            return None
        if not ids:
            full = encoded.start >= max_length  # no room for a response
            counts["sequences whose prompt fills the limit" if full else "sequences dropped as overlong"] += 1
            return None
        counts["sequences truncated"] += len(ids) < len(encoded.ids)
        return {
            "row": index,
            "response": k,
            "start": encoded.start,
            "ids": ids,
            "prompt_key": hash_content(prompt_content(row.prompt)),
            "score": response.score,
            "weight": response.weight,
            "name": name,
        }

    with (
        replacing(target / "sequences.arrow", shared=True) as partial,
        ArrowWriter(path=str(partial), features=FEATURES) as writer,
    ):
        chosen = list(zip(choice.row.tolist(), choice.response.tolist(), strict=True))
        for begin in range(0, len(chosen), size):
            unit = [tokenize(index, k) for index, k in chosen[begin : begin + size]]
            records = [record for record in unit if record is not None]
            if len(records) < len(unit):
                counts["sequences dropped with their pair"] += len(records)
                continue
            if pairs and records[0]["ids"] == records[1]["ids"]:
                counts["pairs left out: both responses are the same tokens"] += 1
                continue
            for record in records:
                ended += record["ids"][-1] in chat.end_tokens
                total += 1
                content.update(repr((record["start"], record["ids"])).encode())
                writer.write(record)
        writer.finalize()
        if total and not ended:
            problems.add(
                "all rows",
                "every response was truncated, so none ends with the template's end token and the model would never "
                "learn to stop. Increase data.max_length, or generate.max_new_tokens for sampled responses",
            )
        advice = "Set data.overlong=drop to drop overlong rows, or increase data.max_length."
        problems.check(advice if counts["sequences that are errors"] else "")
        if on_template_change == "error":
            changes.settle("error")
    done = {
        "counts": {k: v for k, v in counts.items() if v}, "content": content.hexdigest()[:16], "ended": int(ended),
        "changes": changes.found[:20], "changed_rows": changes.rows,
    }  # fmt: skip
    finish(target, done)
