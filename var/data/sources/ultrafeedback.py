"""UltraFeedback (Cui et al., arXiv 2310.01377): hub openbmb/UltraFeedback, 63,967 prompts of four completions, MIT."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from var.data.rows import Response, Row, messages
from var.data.sources import hub, local
from var.utils.errors import UserError

HUB = "openbmb/UltraFeedback"
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
KEEP = ("all", "best_worst", "best")


@dataclass(frozen=True, kw_only=True)
class UltraFeedback:
    """Completions by the mean of their aspect ratings (1 to 5), best first.

    The mean is over the ratings that are there, "N/A" is none. `overall_score` is never read: some 2,000 of its 1
    became 10 (OpenBMB/UltraFeedback #8). Left out and counted: empty prompts, those with fewer than two completions
    that have text and a rating, and with keep=best_worst those whose best and worst are rated the same.
    keep: all, best_worst (a pair), best. ratings_as_score: the mean is the score; else rewards come from a model.
    path: a local copy instead of the hub.
    """

    keep: str = "all"
    ratings_as_score: bool = False
    path: str | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise UserError(f"data.source.keep is one of {', '.join(KEEP)}, got {self.keep}")

    def records(self) -> Iterator[tuple[str, Any]]:
        return hub.records(HUB) if self.path is None else local.records(local.listed(self.path, "data.path"))

    def row(self, where: str, record: Any) -> Row | None:
        record = local.parse(record)
        rated = [(mean_rating(c["annotations"]), c) for c in record["completions"] if (c["response"] or "").strip()]
        ranked = sorted(((mean, c) for mean, c in rated if mean is not None), key=lambda item: -item[0])
        prompt = messages(record["instruction"])
        if len(ranked) < 2 or not prompt[-1]["content"].strip():
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

    def identity(self) -> Mapping[str, Any]:
        if self.path is None:
            return {**local.settings(self), "fingerprint": hub.fingerprint(HUB)}
        return {**local.settings(self), "files": local.stamps(local.listed(self.path, "data.path"))}


def mean_rating(annotations: Mapping[str, Any]) -> float | None:
    """Mean of the aspects' ratings that are numbers; None where there is none."""
    given = [(annotations.get(aspect) or {}).get("Rating") for aspect in ASPECTS]
    ratings = [float(rating) for rating in given if rating is not None and str(rating).strip() not in ("", "N/A")]
    return sum(ratings) / len(ratings) if ratings else None
