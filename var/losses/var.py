"""VAR: SFT weighted by exp(r/λ) / Z(x) (Du et al., arXiv 2502.11026, Eq. 8 to 10).

Three things differ from the paper. Weights are computed before training from cached numbers, so a step is an SFT step.
They are divided by the data set's mean weight, once. And Z(x) has more estimators than the micro-batch
(`var/weights/estimators.py`). With `reference=live`, a step is the paper's: it runs the reference, and weights are not
divided by their mean (`var/annotate/weights.py`).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import Normalize, check_normalize, weighted_nll
from var.models.packing import Packed
from var.requirements import Requirement, Rewards, Weights
from var.utils.errors import UserError
from var.weights.estimators import Estimator


@dataclass(frozen=True, kw_only=True)
class VAR:
    """Weighted negative log-likelihood of the responses. The weight never depends on θ and is never negative."""

    estimator: Estimator
    """How Z(x) is estimated."""
    temperature: float = 1.0
    """λ > 0. A small λ trusts the reward; λ → ∞ is SFT."""
    temperature_unit: Literal["reward", "sd"]
    """`reward`, or `sd` for multiples of the reward's standard deviation within a prompt."""
    min_weight: float = 0.0
    """Responses with a smaller weight are skipped: each would cost as much as any other and teach little."""
    roulette: bool = False
    """Whether they are kept with probability weight/min_weight instead, with weight min_weight, which is unbiased."""
    normalize: Normalize = "token"
    """`token` divides by the response tokens of the optimizer step, `sequence` by its sequences."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"loss.temperature must be above 0, got {self.temperature}. For λ → ∞ use loss=sft.")
        if self.temperature_unit not in ("reward", "sd"):
            raise UserError(f"loss.temperature_unit must be reward or sd, got {self.temperature_unit}")
        if self.roulette and self.estimator.needs_plan:
            raise UserError(
                "loss.roulette=true needs weights that do not depend on the micro-batch, as those of loss=var_grouped "
                "or var_prompt"
            )
        if self.min_weight < 0 or (self.min_weight and self.estimator.needs_plan):
            raise UserError(
                "loss.min_weight must be at least 0, and 0 with an in-batch estimator, whose micro-batches are fixed"
            )
        if self.roulette and not self.min_weight:
            raise UserError("loss.roulette=true has no effect with loss.min_weight=0. Set loss.min_weight=1.")
        check_normalize(self.normalize)

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """Rewards, and the weight that `var/annotate/weights.py` computes from them."""
        return (
            Rewards(),
            Weights(
                estimator=self.estimator,
                temperature=self.temperature,
                temperature_unit=self.temperature_unit,
                min_weight=self.min_weight,
                roulette=self.roulette,
            ),
        )

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the loss of this micro-batch, −Σ_i w_i log π_θ(y_i|x_i) over the step's tokens, and its metrics.

        Args:
            logps: [N] nats, log π_θ of each response token.
            batch: the micro-batch; `batch.weights` [B] are the weights.
        """
        assert batch.weights is not None
        return weighted_nll(logps, batch.weights, batch, self.normalize)
