"""Pairs, groups, and which responses are desirable."""

from typing import Any

import numpy as np
import torch

from var.annotate.base import Provider, TrainingSet
from var.requirements import Desirable, Groups, Pairs
from var.utils.console import warn
from var.utils.errors import UserError


class ProvidePairs(Provider[Pairs]):
    """Provides pairs: the better and the worse response of each row, as neighbors in one micro-batch."""

    unit = "pair"

    @property
    def both_responses(self) -> bool:
        """The better and the worse response train."""
        return True


class ProvideGroups(Provider[Groups]):
    """Provides groups: all responses to a prompt in one micro-batch. `Packed.group` tells them apart."""

    unit = "group"


class ProvideDesirable(Provider[Desirable]):
    """Provides whether a response is to be imitated: by a threshold on its reward, or as the better one of a pair."""

    @property
    def both_responses(self) -> bool:
        """Without a threshold, the better and the worse response train, each by itself."""
        return self.requirement.threshold is None

    def check_choice(self, data: TrainingSet) -> None:
        """Check that rows have two responses, if the better one is to be desirable."""
        if self.both_responses and not len(data.choice.row):
            raise UserError(
                "no row has two responses, of which the better one would be desirable. For single responses set "
                "loss.threshold, the reward above which a response is desirable."
            )

    def select(self, data: TrainingSet) -> None:
        """Label the sequences."""
        if self.requirement.threshold is not None:
            self.desirable = data.require_rewards(self.requirement) > self.requirement.threshold
        else:
            better = (data.choice.row << 32 | data.choice.response)[0::2]
            self.desirable = torch.from_numpy(np.isin(data.sequences.row << 32 | data.sequences.response, better))
        data.report.desirable_sequences = count = int(self.desirable.sum())
        if count in (0, len(self.desirable)):
            kind = "desirable" if count else "undesirable"
            warn(
                f"all {len(self.desirable)} responses are {kind}, and this loss learns from the difference between "
                "desirable and undesirable ones. Check the scores or labels and loss.threshold, or use loss=sft."
            )

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return the labels, [B] bool."""
        return {"desirable": self.desirable[members]}
