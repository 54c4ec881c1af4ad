"""Inputs for the tests of weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.losses import double
from var.requirements import Weights
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
    """Return the requirement with VAR's default settings."""
    return Weights(
        estimator=estimator, **{"temperature": 1.0, "temperature_unit": "reward", "min_weight": 0.0, **settings}
    )


def weigh(estimator: Estimator, inputs: WeightInputs, temperature: float = 1.0, **settings: Any) -> Tensor:
    """Return the weights that train: of mean 1 over the responses that train."""
    return compute_weights(require_weights(estimator, temperature=temperature, **settings), inputs)
