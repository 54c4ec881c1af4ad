"""Convert records to rows and check them, in parts that several processes share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from var.data.messages import last_text, prompt_content, texts_in
from var.data.row import Row
from var.data.rows import in_parts
from var.utils.provenance import hash_content

LONGEST = 5_000_000  # characters of a row. A tokenizer takes 300 times as many bytes, before anything can be truncated
INVALID = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)  # what a malformed record raises


@dataclass
class Checked:
    """The rows in some records of a source."""

    parts: list[tuple[pa.Table, np.ndarray]] = field(default_factory=list)
    """The rows with their facts, or those before the first problem: some faulty rows cannot be written."""
    ids: bytearray = field(default_factory=bytearray)
    """16 bytes of hash per row, also of rows that are not in `parts`."""
    prompts: bytearray = field(default_factory=bytearray)
    """As ids, if records with equal prompts become one row; else empty."""
    left_out: int = 0
    """Records that the source skips."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(where, what) of each problem."""
    example: str = ""
    """The first invalid record next to a valid one."""
    notes: Any = None
    """What the source notes about these records; see `Source`."""


def check_records(source: Any, records: Iterable[tuple[str, Any]]) -> Checked:
    """Convert records of a source, given with their places, to rows."""
    found, rows = Checked(), list[Row]()
    explain = getattr(source, "explain", lambda record: "")
    for where, record in records:
        try:
            row = source.row(where, record)
        except INVALID as error:
            found.problems.append((where, f"missing {error}" if isinstance(error, KeyError) else str(error)))
            found.example = found.example or explain(record)
            continue
        if row is None:
            found.left_out += 1
            continue
        if faults := find_faults(row):
            found.problems += [(where, f"{fault} (row {row.id})") for fault in faults]
            found.example = found.example or explain(record)
        found.ids += hash_content(row.id)
        if getattr(source, "single", False):  # as `_group_records` of var/data/read.py joins them
            found.prompts += hash_content(prompt_content(row.prompt), str(row.answer), str(row.subset))
        if not found.problems:
            rows.append(row)
    found.parts, found.notes = list(in_parts(rows)), getattr(source, "notes", None)
    return found


def find_faults(row: Row) -> list[str]:
    """Return what makes a row unusable for any loss: empty or unencodable text, invalid scores or weights."""
    faults = []
    texts = [row.id, row.answer, row.subset, row.sampling, *(r.source for r in row.responses)]
    texts += texts_in([prompt_content(row.prompt), *([r.text, r.message] for r in row.responses)])
    try:
        "".join(filter(None, texts)).encode()
    except UnicodeEncodeError as error:
        faults.append(f"its text cannot be written as UTF-8: unpaired surrogate {error.object[error.start]!r}")
    if (size := sum(map(len, filter(None, texts)))) > LONGEST:
        faults.append(f"its texts have {size:,} characters, and a row may have {LONGEST:,}; shorten or remove it")
    if not last_text(row.prompt).strip():
        faults.append("its prompt is empty")
    for k, response in enumerate(row.responses):
        if not response.text.strip() and not response.message:
            faults.append(f"response {k} is empty")
        if response.score is not None and not math.isfinite(response.score):
            faults.append(f"the score of response {k} is {response.score}; scores must be finite")
        if response.weight is not None and not (math.isfinite(response.weight) and response.weight >= 0):
            faults.append(f"the weight of response {k} is {response.weight}; weights must be finite and ≥ 0")
    return faults
