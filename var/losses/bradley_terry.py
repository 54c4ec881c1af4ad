"""Bradley-Terry reward model (Stiennon et al., arXiv 2009.01325; margin: Llama 2, arXiv 2307.09288, Eq. 2)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Mean, Metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """margin: ≥ 0, multiplies the gap of the pair's own rewards, by which the better one is to win; 0 leaves them out.

    centring: k ≥ 0 of k · (s_w + s_l)², which holds the scores around zero, where the likelihood leaves them free.
    """

    margin: float = 0.0
    centering: float = 0.0

    def __post_init__(self) -> None:
        if self.margin < 0 or self.centering < 0:
            raise UserError("loss.margin and loss.centring are ≥ 0")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS, Need.SCALAR_HEAD} | ({Need.REWARDS} if self.margin else set()))

    def __call__(self, scores: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """scores: [B] of the trained model, better and worse alternating. Mean over the step's pairs."""
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
