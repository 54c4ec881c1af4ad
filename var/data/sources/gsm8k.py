"""GSM8K (Cobbe et al., arXiv 2110.14168): word problems of school mathematics with a number as the answer.

Hub: openai/gsm8k, configuration `main`, 7,473 training and 1,319 test problems, license MIT.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from var.data.messages import parse_prompt
from var.data.row import Row
from var.data.sources import local
from var.data.sources.hub import HubSource, Part

MARK = "####"  # between the solution and the number


@dataclass(frozen=True, kw_only=True)
class GSM8K(HubSource):
    """Read the problems as prompts, which the model answers. The solutions are not used, only their numbers."""

    license = "mit"
    parallel: ClassVar[bool] = True

    split: str = "train"  # train or test
    instruction: str = ""  # follows each problem, such as a request to end with a number
    path: str | None = None  # a local copy, read instead of the hub
    revision: str | None = None  # commit or tag on the hub

    expected_responses = 0

    @property
    def expected_rows(self) -> int | None:  # type: ignore[override]
        """Problems of the split."""
        return {"train": 7473, "test": 1319}.get(self.split)

    @property
    def parts(self) -> list[Part]:
        """The split."""
        return [Part("openai/gsm8k", "main", self.split, revision=self.revision)]

    def row(self, where: str, record: Any) -> Row:
        """Return a problem with its number."""
        record = local.parse_record(record)
        _, mark, number = record["answer"].rpartition(MARK)
        if not mark:
            raise ValueError(f"'answer' has no {MARK} before a number")
        text = "\n\n".join(filter(None, (record["question"], self.instruction)))
        return Row(id=where, prompt=parse_prompt(text), answer=number.strip().replace(",", ""))
