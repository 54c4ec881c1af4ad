"""Bradley-Terry reward model (Stiennon et al., arXiv 2009.01325; margin: Llama 2, arXiv 2307.09288, Eq. 2)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Mean, Metrics
from var.models.packing import Packed
from var.requirements import Pairs, Requirement, Rewards, SequenceScores
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """Negative log-likelihood of the pairs' order under a reward model."""

    margin: float = 0.0
    """≥ 0. The better response must win by this factor times the difference of the pair's rewards; 0: no margin."""
    centering: float = 0.0
    """k ≥ 0 of k · (s_w + s_l)², which keeps scores around zero; the likelihood alone leaves their level free."""

    def __post_init__(self) -> None:
        if self.margin < 0 or self.centering < 0:
            raise UserError("loss.margin and loss.centering must be at least 0")

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """Pairs and scores, and rewards for the margin."""
        return (Pairs(), SequenceScores(), *((Rewards(),) if self.margin else ()))

    def __call__(self, scores: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics.

        Args:
            scores: [B] of the trained model. Sequences alternate, better and worse.
            batch: the micro-batch.
        """
        gap = scores[0::2] - scores[1::2]
        wanted = gap.new_zeros(len(gap))
        if self.margin:
            assert batch.rewards is not None
            wanted = self.margin * (batch.rewards[0::2] - batch.rewards[1::2]).to(gap.dtype)
        total = scores[0::2] + scores[1::2]
        losses = -logsigmoid(gap - wanted) + self.centering * total.square()
        pairs = float(len(gap))
        metrics = {
            "score/margin": Mean(gap.detach().sum(), pairs),
            "score/accuracy": Mean((gap > 0).to(gap).sum(), pairs),
            "score/mean": Mean(scores.detach().sum(), 2 * pairs),
        }
        return losses.sum() / (batch.global_sequences / 2), metrics
