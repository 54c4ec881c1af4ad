"""A custom loss: VAR with a limit on its weights, which bounds what one response with an outlying reward can do."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Metrics
from var.models.packing import Packed
from var.requirements import Requirement, Rewards, Weights
from var.utils.errors import UserError
from var.weights.estimators import Grouped


@dataclass(frozen=True, kw_only=True)
class CappedVAR:
    """SFT with the weight min(w, largest), where w is exp(r/λ)/Z(x) within the group of a prompt's responses."""

    largest: float = 2.0
    """A number > 0. The mean of w over the data set is 1."""

    requires: ClassVar[tuple[Requirement, ...]] = (
        Rewards(),
        Weights(
            estimator=Grouped(drop_zero_variance=True),
            temperature=1.0,  # λ, in standard deviations of the reward within a prompt
            temperature_unit="sd",
            min_weight=0.0,
        ),
    )

    def __post_init__(self) -> None:
        if not self.largest > 0:
            raise UserError(f"loss.largest: expected a number > 0, got {self.largest}.")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the weighted negative log-likelihood per token of the complete step, and no metrics.

        logps: [N] nats.
        """
        assert batch.weights is not None
        weights = batch.weights.clamp(max=self.largest)
        return -(weights[batch.sequence] * logps).sum() / batch.global_tokens, {}
