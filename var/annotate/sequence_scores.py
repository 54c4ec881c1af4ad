"""Reward models: pairs of the validation rows, on which their accuracy is measured."""

from var.annotate.base import Provider, TrainingSet
from var.annotate.responses import add_responses, sample_responses
from var.annotate.rewards import score_rows
from var.data.choice import choose, needs_rewards
from var.data.sequences import Sequences
from var.requirements import SequenceScores


class ProvideSequenceScores(Provider[SequenceScores]):
    """Provides validation pairs. The scores themselves are the trained model's output."""

    validation_pairs: Sequences | None = None
    """The better and the worse response of each validation row, alternating; None if the rows have none."""

    def select(self, data: TrainingSet) -> None:
        """Encode the validation pairs."""
        rows, annotator = data.validation, data.annotator
        if not len(rows):
            return
        if not len(rows[0].responses):
            samples = sample_responses(annotator, rows, data.sampling)
            rows = add_responses(rows, samples, annotator.chat, annotator.cache)
        rewards = score_rows(annotator, rows) if needs_rewards(rows, "both") else None
        choice = choose(rows, "both", rewards)
        if len(choice.row):
            self.validation_pairs = data.encode(rows, choice, pairs=True)
