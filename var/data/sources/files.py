"""The user's own rows, in any of the known forms: a file, a folder of files, or a data set of the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from var.data.parse import KEYS
from var.data.sources.detection import FormSource, Reader, advise
from var.data.sources.forms import FORMS, PROMPT, RESPONSE, ROWS
from var.utils.errors import UserError


@dataclass(kw_only=True)
class Files(FormSource):
    """Read records one by one, so the data set may be larger than memory.

    A record without `id` is named after its position, such as `file.jsonl:12`. Records with one response each and
    equal prompts become one row.
    """

    path: str  # a file, a folder or a hub id
    columns: Mapping[str, str | None] | None = None  # our names of columns and the data set's
    name: str | None = None  # configuration of a hub set
    split: str = "train"  # split of a hub set
    revision: str | None = None  # commit or tag of a hub set

    allowed: ClassVar = {form: form.example for form in FORMS}
    advice = ""

    def check_form(self, reader: Reader) -> None:
        """Reject records without responses in which another column may have them."""
        columns = set(reader.present)
        if reader.form is not ROWS or "responses" in columns:
            return
        name = next(name for name in PROMPT if name in columns)
        if empty := [column for column in RESPONSE if column in columns]:
            raise UserError(f"{self.path}: {empty[0]!r} has no value in any of the first records")
        if name != "prompt" and "answer" in columns:
            raise UserError(
                f"{self.path}: 'answer' may be a response or the reference answer of a reward. Set "
                f"data.columns='{{prompt: {name}, response: answer}}' to train on it, or data=prompts to compare "
                "sampled responses with it"
            )
        if len(half := columns & {"chosen", "rejected"}) == 1:
            other = min({"chosen", "rejected"} - half)
            raise UserError(
                f"{self.path}: it has {min(half)!r} without {other!r}; the columns are {', '.join(reader.present)}. "
                + (advise(reader.present) or f"Name its column, as in data.columns='{{{other}: …}}'.")
            )
        if unknown := [column for column in reader.present if column not in (*KEYS, name)]:
            advice = advise(reader.present) or f"Name it, as in data.columns='{{response: {unknown[-1]}}}'."
            raise UserError(
                f"{self.path}: no known column has responses; the columns are {', '.join(reader.present)}. {advice} "
                "Or set data=prompts to sample responses."
            )
