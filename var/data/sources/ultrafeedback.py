"""UltraFeedback (Cui et al., arXiv 2310.01377): completions of several models, rated by GPT-4.

Hub: openbmb/UltraFeedback, 63,967 prompts with four completions each, license MIT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from var.data.messages import last_text, parse_prompt
from var.data.row import Response, Row
from var.data.sources import local
from var.data.sources.hub import HubSource, Part
from var.utils.errors import UserError

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
KEEP = ("all", "best_worst", "best")


@dataclass(frozen=True, kw_only=True)
class UltraFeedback(HubSource):
    """Order completions by the mean of their aspect ratings (1 to 5), best first.

    Ratings of "N/A" are ignored. So is `overall_score`: about 2,000 scores of 1 were changed to 10
    (OpenBMB/UltraFeedback #8). Empty prompts, prompts with fewer than two rated completions and,
    with keep=best_worst, prompts whose completions all have the same rating are skipped and counted.
    """

    license = "mit"
    parallel: ClassVar[bool] = True

    keep: str = "all"  # the completions of a row: all, best_worst (a pair) or best
    ratings_as_score: bool = False  # use the mean rating as the score; else the reward comes from a model
    path: str | None = None  # a local copy, read instead of the hub
    revision: str | None = None  # commit or tag on the hub

    expected_rows = 63_967

    @property
    def parts(self) -> list[Part]:
        """The only split."""
        return [Part("openbmb/UltraFeedback", revision=self.revision)]

    @property
    def expected_responses(self) -> int:  # type: ignore[override]
        """Completions per row."""
        return {"all": 4, "best_worst": 2, "best": 1}[self.keep]

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise UserError(f"data.source.keep: expected one of {', '.join(KEEP)}, got {self.keep}")

    def row(self, where: str, record: Any) -> Row | None:
        """Return the completions of a prompt, ordered unless all have the same rating."""
        record = local.parse_record(record)
        rated = [
            (compute_mean_rating(c["annotations"]), c) for c in record["completions"] if (c["response"] or "").strip()
        ]
        ranked = sorted(((mean, c) for mean, c in rated if mean is not None), key=lambda item: -item[0])
        prompt = parse_prompt(record["instruction"])
        if len(ranked) < 2 or not last_text(prompt).strip():
            return None
        differ = ranked[0][0] > ranked[-1][0]
        if self.keep == "best_worst" and not differ:
            return None
        kept = {"all": ranked, "best_worst": [ranked[0], ranked[-1]], "best": ranked[:1]}[self.keep]
        responses = tuple(
            Response(text=c["response"], source=c["model"], score=mean if self.ratings_as_score else None)
            for mean, c in kept
        )
        return Row(id=where, prompt=prompt, responses=responses, ordered=differ)


def compute_mean_rating(annotations: Mapping[str, Any]) -> float | None:
    """Return the mean of the aspect ratings that are numbers, or None if there are none."""
    values = [(annotations.get(aspect) or {}).get("Rating") for aspect in ASPECTS]
    ratings = [float(value) for value in values if value is not None and str(value).strip() not in ("", "N/A")]
    return sum(ratings) / len(ratings) if ratings else None
