"""Inputs for the tests of weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.losses import double
from var.losses.var import VAR
from var.requirements import Weights, find
from var.weights.estimators import Estimator, compute_weights
from var.weights.inputs import WeightInputs


def make_inputs(
    rewards: Tensor | Sequence[float],
    group: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
    **fields: Tensor,
) -> WeightInputs:
    """Return inputs of n sequences, each with its own prompt and of length 1 by default."""
    n = len(rewards)
    return WeightInputs(
        rewards=rewards if isinstance(rewards, Tensor) else double(rewards),
        group=torch.tensor(group if group is not None else range(n)),
        length=torch.tensor(length or [1] * n),
        **fields,
    )


def estimate(estimator: Estimator, inputs: WeightInputs, temperature: float = 1.0) -> Tensor:
    """Return the estimator's weights, before they are divided by their mean."""
    return estimator(inputs, temperature).exp()


def require_weights(estimator: Estimator, **settings: Any) -> Weights:
    """Return VAR's requirement."""
    return find(VAR(estimator=estimator, **{"temperature_unit": "reward", **settings}).requires, Weights)  # type: ignore[return-value]


def weigh(estimator: Estimator, inputs: WeightInputs, temperature: float = 1.0, **settings: Any) -> Tensor:
    """Return the weights that train: of mean 1 over the responses that train."""
    return compute_weights(require_weights(estimator, temperature=temperature, **settings), inputs)
