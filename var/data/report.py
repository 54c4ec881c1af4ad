"""What was found in the data: counts of everything that trains, is skipped, dropped or truncated."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class DataReport:
    """Counts by name. None: it does not apply to this run. A field's name, in words, is what is printed."""

    rows: int | None = None
    """Rows of the data set."""
    records_skipped: int | None = None
    """Records that the data set's adapter skipped, as pairs with an empty response."""
    records_joined: int | None = None
    """Records with one response that were joined to an earlier record's row, since their prompts are equal."""
    degenerate: Counter[str] = field(default_factory=Counter)
    """Training rows that are likely a mistake, by kind (`var.data.degenerate`)."""
    rows_beyond_limit: int | None = None
    """Rows after the first data.limit."""
    rows_not_drawn: int | None = None
    """Rows whose prompts are not among the data.sample drawn ones."""
    development_prompts: int | None = None
    """Prompts that the value estimate is fitted on."""
    rows_with_only_empty_responses: int | None = None
    """Rows all of whose sampled responses were empty."""
    rows_with_unused_responses: int | None = None
    """Rows whose own responses are not used, since responses are sampled."""
    sampled_responses: int | None = None
    """Responses that were sampled."""
    sampled_as_text: int | None = None
    """Of these, the ones that the sampler returned as text, so their tokens may not be those that were drawn."""
    empty_responses_skipped: int | None = None
    """Sampled responses without text."""
    truncated_responses: int | None = None
    """Sampled responses that reached generate.max_new_tokens."""
    responses: str | None = None
    """Which responses train: data.responses, resolved."""
    prompts: int | None = None
    """Prompts of an online run."""
    overlong_prompts_dropped: int | None = None
    """Prompts that leave no room for a response."""
    prompts_dropped_by_plan: int | None = None
    """Prompts dropped with the last micro-batch or step."""
    desirable_sequences: int | None = None
    """Sequences to be imitated."""
    advantages: dict[str, float] | None = None
    """positive: the fraction above 0; mean; drawn and distinct: training sequences."""
    reward: dict[str, Any] | None = None
    """mean and sd, raw; the scale; within_prompt_sd on that scale."""
    groups: int | None = None
    """Distinct prompts."""
    groups_of_one: int | None = None
    """Of these, the ones with a single response, if the loss compares the responses to a prompt."""
    pairs_with_equal_rewards: int | None = None
    """Training pairs whose responses have the same reward."""
    zero_variance_groups: int | None = None
    """Prompts whose responses have equal rewards."""
    zero_variance_groups_skipped: int | None = None
    """Of these, the ones that are skipped."""
    sequences_skipped_with_them: int | None = None
    """Sequences of the skipped groups."""
    sequences_below_min_weight: int | None = None
    """Sequences whose weight is below loss.min_weight."""
    sequences_lost_in_roulette: int | None = None
    """Sequences that loss.roulette has left out."""
    sequences_of_zero_weight: int | None = None
    """Sequences whose weight underflows to 0."""
    sequences: int | None = None
    """Encoded sequences."""
    sequences_selected: int | None = None
    """Training sequences, if some are skipped. With draws, one that is drawn twice counts twice."""
    sequences_with_end_token: int | None = None
    """Sequences whose last token is the template's end token."""
    encoding: Counter[str] = field(default_factory=Counter)
    """What encoding skipped, dropped or truncated, by name."""
    sequences_dropped_by_plan: int | None = None
    """Sequences dropped with the last micro-batch or step."""
    weights: dict[str, float] | None = None
    """Health of the training weights (`var.weights.health`)."""
    micro_batches: int | None = None
    """Micro-batches per epoch, over all ranks."""
    steps_per_epoch: int | None = None
    """Optimizer steps per epoch."""
    plan: str | None = None
    """The plan's hash."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Entries of requirements outside the package, by name."""

    def to_json(self) -> dict[str, Any]:
        """Return what applies to this run."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "extra"}
        values |= self.extra
        return {name: value for name, value in values.items() if value is not None and value != Counter()}

    def show(self, show: Callable[[str], None]) -> None:
        """Print one line per entry."""
        for name, value in self.to_json().items():
            text = str(value)
            if isinstance(value, dict):
                parts = [f"{key.replace('_', ' ')}: {_shorten(part)}" for key, part in value.items()]
                text = ", ".join(parts)
            show(f"  {name.replace('_', ' ').replace('zero variance', 'zero-variance')}: {text}")


def _shorten(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
