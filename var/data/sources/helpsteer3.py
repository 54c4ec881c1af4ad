"""HelpSteer3-Preference (Wang et al., arXiv 2505.11475): two responses to a dialogue, compared by people.

Hub: nvidia/HelpSteer3, configuration `preference`, 38,459 training rows, license CC BY 4.0.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from var.data.messages import parse_prompt
from var.data.row import Response, Row
from var.data.sources import local
from var.data.sources.hub import HubSource, Part
from var.data.sources.pairs import is_empty


@dataclass(frozen=True, kw_only=True)
class HelpSteer3(HubSource):
    """Order the two responses by the overall preference, from −3 (the first is much better) to 3.

    Ties, and rows with an empty prompt or response, are skipped and counted. The domain is the row's subset.
    """

    license = "cc-by-4.0"
    parallel: ClassVar[bool] = True

    split: str = "train"  # train or validation
    path: str | None = None  # a local copy, read instead of the hub
    revision: str | None = None  # commit or tag on the hub

    @property
    def expected_rows(self) -> int | None:  # type: ignore[override]
        """Rows of the split."""
        return 38_459 if self.split == "train" else None

    @property
    def parts(self) -> list[Part]:
        """The split."""
        return [Part("nvidia/HelpSteer3", "preference", self.split, revision=self.revision)]

    def row(self, where: str, record: Any) -> Row | None:
        """Return a pair, the better response first."""
        record = local.parse_record(record)
        preference = float(record["overall_preference"])
        if not preference:
            return None
        texts = record["response1"], record["response2"]
        best, worst = texts if preference < 0 else texts[::-1]
        responses = tuple(Response(text=text or "") for text in (best, worst))
        prompt = parse_prompt(record["context"])
        row = Row(id=where, prompt=prompt, responses=responses, ordered=True, subset=record.get("domain"))
        return None if is_empty(row) else row
