"""DPO (Rafailov et al., arXiv 2305.18290, Eq. 7), with conservative labels (Mitchell, 2023: cDPO)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.weighted import Mean, Metrics
from var.needs import Need
from var.packing import Packed
from var.problems import UserError


@dataclass(frozen=True, kw_only=True)
class DPO:
    """beta: β > 0, the KL coefficient. label_smoothing: share of pairs taken to be labelled wrongly, in [0, 1/2)."""

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 <= self.label_smoothing < 0.5:
            raise UserError("loss.beta is β > 0 and loss.label_smoothing lies in [0, 0.5)")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        ratio = log_ratios(logps, batch)
        margin = self.beta * (ratio[0::2] - ratio[1::2])
        smooth = self.label_smoothing
        losses = -(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin)
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)


def log_ratios(logps: Tensor, batch: Packed) -> Tensor:
    """[B] nats: log π_θ(y|x) − log π_ref(y|x), summed over response tokens."""
    return batch.sum_by_sequence(token_log_ratios(logps, batch))


def token_log_ratios(logps: Tensor, batch: Packed) -> Tensor:
    """[N] nats: log π_θ − log π_ref of each response token."""
    assert batch.reference_logps is not None
    return logps - batch.reference_logps.to(logps.dtype)


def pair_metrics(logps: Tensor, batch: Packed, implicit: Tensor) -> Metrics:
    """What a preference loss is watched by. implicit: [B] implicit rewards, better and worse alternating.

    Under DPO the log-probability of the chosen response usually falls too: the loss sees only the difference.
    """
    summed, implicit = batch.sum_by_sequence(logps.detach()), implicit.detach()
    pairs = len(batch) / 2
    margin = implicit[0::2] - implicit[1::2]
    return {
        "nll": Mean(-logps.detach().sum(), float(len(logps))),
        "logps/chosen": Mean(summed[0::2].sum(), pairs),
        "logps/rejected": Mean(summed[1::2].sum(), pairs),
        "implicit_reward/margin": Mean(margin.sum(), pairs),
        "implicit_reward/accuracy": Mean((margin > 0).to(margin).sum(), pairs),
    }
