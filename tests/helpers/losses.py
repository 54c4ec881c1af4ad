"""Batches and checks for the tests of losses. Only lengths matter to a loss; token ids do not."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from var.losses.base import Metrics
from var.models.packing import Packed, pack
from var.requirements import ValueFit

# The value fit of A-LoL. Its numbers do not enter the loss.
VALUE_FIT = ValueFit(
    development_prompts=8, epochs=1, learning_rate=1e-3, heads=2, batch=4, lowest=0.0, largest=1.0, seed=0
)

# Two pairs, the better response first: of 2 and 1 tokens, and of 1 and 2 tokens.
LENGTHS = [2, 1, 1, 2]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5]  # means per sequence: −1.5, −4 | −3, −1.25
REFERENCE = [-2.0, -3.0, -4.5, -1.0, -2.0, -2.5]  # log-ratios per sequence: 2, 0.5 | −2, 2. Margins: 1.5, −4


def double(values: Sequence[float]) -> Tensor:
    """Return the values as float64."""
    return torch.tensor(values, dtype=torch.float64)


def make_batch(lengths: Sequence[int], group: Sequence[int] | None = None, **fields: Any) -> Packed:
    """Pack sequences of one prompt token and `lengths` response tokens.

    Lists become tensors. Token and sequence divisors are those of this batch unless given.
    """
    tensors = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in fields.items()}
    divisors = {"global_tokens": float(sum(lengths)), "global_sequences": float(len(lengths))}
    ids = [[0, *range(1, length + 1)] for length in lengths]
    return pack(ids, [1] * len(lengths), group=group, **{**divisors, **tensors})


def value_and_gradient(function: Callable[[Tensor], Tensor], logps: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's value and its gradient at `logps`."""
    logps = logps.detach().clone().requires_grad_(True)
    value = function(logps)
    value.backward()
    assert logps.grad is not None
    return value.detach(), logps.grad


def compute_loss(loss: Any, batch: Packed, logps: Sequence[float] = LOGPS) -> tuple[float, Tensor, dict[str, float]]:
    """Return the loss, its gradient and the means of its metrics, in float64."""
    metrics: Metrics = {}

    def function(logps: Tensor) -> Tensor:
        value, found = loss(logps, batch)
        metrics.update(found)
        return value

    value, gradient = value_and_gradient(function, double(logps))
    return value.item(), gradient, compute_means(metrics)


def compute_means(metrics: Metrics) -> dict[str, float]:
    """Return the mean of each metric."""
    return {name: float(total / number) for name, (total, number) in metrics.items()}


def check_loss(
    loss: Any,
    batch: Packed,
    value: float,
    gradient: Sequence[float],
    logps: Sequence[float] = LOGPS,
    rtol: float = 1e-9,
) -> dict[str, float]:
    """Compare a loss and its gradient with numbers computed by hand; return the means of its metrics."""
    found, slope, metrics = compute_loss(loss, batch, logps)
    assert_close((double([found]), slope), (double([value]), double(gradient)), rtol=rtol, atol=0)
    return metrics


def minimize(loss_of_table: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Return the distribution over `size` responses that minimizes a function of its log-probabilities."""
    table = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss_of_table(table.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach().softmax(0)
