"""DRO-V: r − λ log π_θ/π_ref is regressed on a learned V(x) (Richemond et al., arXiv 2405.19107).

One scored response per prompt is enough, from any policy. At the minimum π_θ is RLHF's optimum π_ref exp(r/λ)/Z(x), and
V(x) = λ log Z(x). The policy's part of the gradient is divided by λ, and V's part has a weight of its own. One thing
differs from the paper: V is a linear head on the policy's hidden state at the prompt's end and not a second model, so
its error trains the policy's layers too.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import log_ratios, response_metrics
from var.models.packing import Packed
from var.requirements import ReferenceLogps, Requirement, Rewards, TokenValues
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DRO:
    """Squared error of the reward against value plus scaled log-ratio."""

    temperature: float = 1.0
    """λ > 0, in units of the reward; τ of the paper."""
    value_weight: float = 1.0
    """The weight of half the squared error in the gradient of V, above 0."""
    initial_value: float = 0.0
    """V before training, in units of the reward. Far below the rewards, every response first becomes more likely."""

    requires: ClassVar[tuple[Requirement, ...]] = (Rewards(), ReferenceLogps(), TokenValues())

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.value_weight > 0:
            raise UserError("loss.temperature and loss.value_weight must be above 0")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch, divided by the step's sequences, and its metrics.

        `batch.values` hold a gradient, as `logps` do.
        """
        assert batch.rewards is not None
        assert batch.values is not None
        implicit, rewards = self.temperature * log_ratios(logps, batch), batch.rewards.to(logps.dtype)
        first = batch.length.cumsum(0) - batch.length
        values = self.initial_value + batch.values.to(logps.dtype)[first]  # before the first token
        policy = (rewards - values.detach() - implicit).square() / (2 * self.temperature)
        value = (rewards - values - implicit.detach()).square() / 2
        count = float(len(batch))
        metrics = {
            **response_metrics(logps, batch),
            "value/mean": Mean(values.detach().sum(), count),
            "value/loss": Mean(value.detach().sum(), count),
            "implicit_reward/mean": Mean(implicit.detach().sum(), count),
        }
        return (policy + self.value_weight * value).sum() / batch.global_sequences, metrics
