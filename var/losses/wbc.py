"""wBC, weighted behaviour cloning: a response's reward weighs its NLL (a baseline of Baheti et al., arXiv 2305.14718).

Over tables its minimiser is π_ref(y|x) R(x, y) normalised: linear in the reward where VAR is exponential.
"""

from dataclasses import dataclass

from torch import Tensor

from var.losses.weighted import Mean, Metrics, weighted_nll
from var.needs import Need
from var.packing import Packed
from var.problems import UserError


@dataclass(frozen=True, kw_only=True)
class WBC:
    """No settings. Rewards must not be negative: reward_scale brings them there."""

    rewards_weigh = True  # see weighing_rewards; the data module refuses negative ones ahead

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Mean over the step's sequences."""
        rewards = weighing_rewards(batch)
        loss, _ = weighted_nll(logps, rewards, batch, "sequence")
        return loss, {**response_metrics(logps, batch), "weight/mean": Mean(rewards.sum(), float(len(rewards)))}


def weighing_rewards(batch: Packed) -> Tensor:
    """[B] rewards, ≥ 0: with a negative weight π_θ(y|x) → 0 would send the loss to −∞."""
    assert batch.rewards is not None
    rewards = batch.rewards.detach()
    if (lowest := float(rewards.min())) < 0:
        raise UserError(
            f"this loss weighs responses by their rewards, and one is {lowest:.4g}; weights must not be negative: set "
            "reward_scale=sigmoid"
        )
    return rewards


def response_metrics(logps: Tensor, batch: Packed) -> Metrics:
    """nll of a token, and log π_θ of a whole response: its fall shows answers being pushed down."""
    total = logps.detach().sum()
    return {"nll": Mean(-total, float(len(logps))), "logps/sequence": Mean(total, float(len(batch)))}
