"""wBC, weighted behavior cloning: a response's reward weights its NLL (a baseline of Baheti et al., arXiv 2305.14718).

For a tabular policy, the minimizer is π_ref(y|x) R(x, y), normalized: linear in the reward where VAR is exponential.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import response_metrics, weighted_nll
from var.models.packing import Packed
from var.requirements import Requirement, Rewards


@dataclass(frozen=True, kw_only=True)
class WBC:
    """Reward times NLL. Rewards must be ≥ 0; reward_scale=sigmoid makes them positive."""

    requires: ClassVar[tuple[Requirement, ...]] = (Rewards(nonnegative=True),)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch, divided by the step's sequences, and its metrics."""
        assert batch.rewards is not None
        loss, _ = weighted_nll(logps, batch.rewards, batch, "sequence")
        weight = Mean(batch.rewards.detach().sum(), float(len(batch)))
        return loss, {**response_metrics(logps, batch), "weight/mean": weight}
