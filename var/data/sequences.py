"""Sequences: which responses of the rows train, as tokens, on disk; what was left out, cut or dropped is counted."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import numpy as np

from var.data.chat import Chat
from var.data.rows import Rows, finish
from var.utils.errors import Problems, UserError
from var.utils.files import replacing
from var.utils.provenance import hash_content

Responses = Literal["chosen", "both", "best", "all"]
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
    """row, response: [n] which response of which row trains; pairs stand side by side, the better one first."""

    row: np.ndarray
    response: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Sequences:
    """n encoded sequences. table: on disk, columns as FEATURES. The arrays are [n] and in memory.

    group: 0..G-1, equal where the prompts are. length: response tokens, the end token among them.
    counts: what was cut, dropped and left out, by name. content: a hash of all tokens, whatever subset this is.
    ended: of all sequences, those whose last token is the template's end token.
    """

    table: datasets.Dataset
    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    group: np.ndarray
    counts: Counter[str]
    content: str
    ended: int

    def __len__(self) -> int:
        return len(self.row)

    @property
    def first(self) -> np.ndarray:
        """[G] the first sequence of each group, which stands for its prompt."""
        return np.unique(self.group, return_index=True)[1]

    def tokens(self, index: int) -> tuple[list[int], int, str]:
        """Token ids, where the response starts, and a name for messages."""
        record = self.table[int(index)]
        return record["ids"], record["start"], record["name"]

    def column(self, name: Literal["score", "weight"]) -> np.ndarray:
        """[n] float64 of the data's own; NaN where a response has none."""
        return np.array([np.nan if v is None else v for v in self.table[name]], dtype=np.float64)


def choose(rows: Rows, responses: Responses, rewards: list[np.ndarray] | None = None) -> Choice:
    """Which responses train. rewards: of each row's responses, needed for `best`, and for `both` of unordered rows.

    chosen: the first of an ordered row. both: the first and the last of an ordered row, else the highest and the
    lowest reward, rows without a difference left out and counted. best: the highest reward. all: all.
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
                problems.add(f"row {item.id}", "its responses stand in no order of preference; set data.responses=best")
            picked = [0]
        elif responses == "both" and n < 2:
            counts["rows with fewer than two responses"] += 1
            continue
        elif responses == "both" and item.ordered:
            picked = [0, n - 1]
        else:
            assert rewards is not None, "the caller brings rewards for best, and for both of unordered rows"
            scores = rewards[i]
            picked = [int(scores.argmax())]
            if responses == "both":
                if scores.max() == scores.min():
                    counts["rows whose responses have one reward"] += 1
                    continue
                picked.append(int(scores.argmin()))
        row.extend([i] * len(picked))
        response.extend(picked)
    problems.check()
    return Choice(np.array(row, dtype=np.int64), np.array(response, dtype=np.int64), counts)


def needs_rewards(rows: Rows, responses: Responses) -> bool:
    """Whether `choose` takes rewards for these rows."""
    return responses == "best" or (responses == "both" and not all(rows.table["ordered"]))


def encode(
    rows: Rows,
    choice: Choice,
    chat: Chat,
    max_length: int,
    overlong: Literal["drop", "truncate", "error"],
    pairs: bool,
    cache: Path,
) -> Sequences:
    """Tokens of the chosen responses, kept under `cache` by content and read from there by memory map.

    A sequence longer than max_length is dropped (with its pair), or cut at its end, or an error; the cut and the
    dropped are counted. A row whose prompt leaves no room for a response is dropped or an error, never trained.
    """
    chat.suffix, chat.end_token  # noqa: B018  a template that cannot be trained fails before the first row
    key = hash_content(
        rows.table._fingerprint,
        chat.tokenizer.chat_template,
        chat.fingerprint,
        hashlib.sha256(choice.row.tobytes() + choice.response.tobytes()).hexdigest(),
        [max_length, overlong, pairs],
    ).hex()
    target = cache / "sequences" / key
    if not (target / "done.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        _write(rows, choice, chat, max_length, overlong, pairs, target)
    done = json.loads((target / "done.json").read_text())
    counts = Counter(done["counts"]) + choice.counts
    table = datasets.Dataset.from_file(str(target / "sequences.arrow"))
    if not len(table):
        raise UserError(f"no sequence is left to train on: {dict(counts)}; raise data.max_length or see data.responses")
    start, ids = np.array(table["start"]), table.data.column("ids")
    total = np.concatenate([chunk.value_lengths().to_numpy() for chunk in ids.chunks])
    keys = np.array([bytes(k) for k in table["prompt_key"]], dtype="S16")
    group = np.unique(keys, return_inverse=True)[1]
    length, row = total - start, np.array(table["row"])
    return Sequences(table, row, start, length, group, counts, done["content"], done["ended"])


def _write(rows: Rows, choice: Choice, chat: Chat, max_length: int, overlong: str, pairs: bool, target: Path) -> None:
    from datasets.arrow_writer import ArrowWriter

    problems = Problems("rows that cannot be tokenised")
    counts: Counter[str] = Counter()
    advice, ended, total = "", 0, 0
    unit = 2 if pairs else 1
    content = hashlib.sha256()
    with (
        replacing(target / "sequences.arrow", shared=True) as partial,
        ArrowWriter(path=str(partial), features=FEATURES) as writer,
    ):
        for begin in range(0, len(choice.row), unit):
            records, dropped = [], False
            for i, k in zip(choice.row[begin : begin + unit], choice.response[begin : begin + unit], strict=True):
                row = rows[i]
                name = f"{row.id}#{k}"
                try:
                    encoded = chat.encode(row.prompt, row.responses[k].text, row.responses[k].finished)
                except ValueError as error:
                    problems.add(f"row {name}", str(error))
                    dropped = True
                    continue
                ids = encoded.ids
                if len(ids) > max_length:
                    full = encoded.start >= max_length
                    if overlong == "error" or (full and overlong == "truncate"):
                        what = f"its prompt alone has {encoded.start} tokens" if full else f"it has {len(ids)} tokens"
                        problems.add(f"row {name}", f"{what}; data.max_length={max_length}")
                        advice = "Set data.overlong=drop to leave overlong rows out, or raise data.max_length."
                    if overlong == "drop":
                        counts[
                            "sequences dropped as overlong" if not full else "sequences whose prompt fills the limit"
                        ] += 1
                    if overlong != "truncate" or full:
                        dropped = True
                        continue
                    counts["sequences cut"] += 1
                    ids = ids[:max_length]  # without an end token: a cut answer does not teach to stop
                response = row.responses[k]
                records.append(
                    {
                        "row": int(i),
                        "response": int(k),
                        "start": encoded.start,
                        "ids": ids,
                        "prompt_key": hash_content(row.prompt),
                        "score": response.score,
                        "weight": response.weight,
                        "name": name,
                    }
                )
            if dropped:
                counts["sequences dropped with their pair"] += len(records) if pairs else 0
                continue
            for record in records:
                ended += record["ids"][-1] == chat.end_token
                total += 1
                content.update(repr((record["start"], record["ids"])).encode())
                writer.write(record)
        writer.finalize()
        if total and not ended:
            what = "none ends with the template's end token; the model would never learn to stop"
            cause = "raise data.max_length, or generate.max_new_tokens for sampled ones"
            problems.add("all rows", f"{what}. Every response was cut: {cause}")
        problems.check(advice)
    done = {"counts": {k: v for k, v in counts.items() if v}, "content": content.hexdigest()[:16], "ended": int(ended)}
    finish(target, done)
