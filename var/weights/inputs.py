"""What the estimators of Z(x) read: numbers of the data set, or of one micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from var.models.packing import Packed


@dataclass(frozen=True, kw_only=True)
class WeightInputs:
    """Numbers of n sequences with G distinct prompts. A field is None if no estimator asked for it."""

    rewards: Tensor
    """[n] in reward units, on the run's scale."""
    group: Tensor
    """[n] int, 0..G-1: the prompt of each sequence."""
    length: Tensor
    """[n] int: response tokens."""
    reference_logps: Tensor | None = None
    """[n] nats: log π_ref(y|x), summed over response tokens."""
    features: Tensor | None = None
    """[G, F]: the reference's hidden states of each prompt."""
    candidates: Tensor | None = None
    """[G, K] in reward units: rewards of K responses that the reference sampled for each prompt."""
    micro: Tensor | None = None
    """[M, B] int: the sequences of each micro-batch, -1 where the last one is short."""
    cross_rewards: Tensor | None = None
    """[M, B, B] in reward units: row i is a prompt, column j a response of the micro-batch."""
    cross_logps: Tensor | None = None
    """[M, B, B] nats: log π_ref(y_j|x_i), summed over response tokens."""

    def get(self, name: str) -> Tensor:
        """Return a field. Raise ValueError if it is absent."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this estimator reads WeightInputs.{name}, which is None")
        return value  # type: ignore[no-any-return]


def micro_batch_inputs(batch: Packed) -> WeightInputs:
    """Return the inputs of one micro-batch, for weights that are computed in the training step."""
    assert batch.rewards is not None
    own = None if batch.reference_logps is None else batch.sum_by_sequence(batch.reference_logps.double())
    return WeightInputs(
        rewards=batch.rewards.double(),
        group=batch.group,
        length=batch.length,
        reference_logps=own,
        micro=torch.arange(len(batch), device=batch.length.device)[None],
        cross_rewards=None if batch.cross_rewards is None else batch.cross_rewards.double()[None],
        cross_logps=None if batch.cross_logps is None else batch.cross_logps.double()[None],
    )
