"""Batches by hand: only lengths matter to a loss, tokens do not. Two pairs, and what a loss makes of a batch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from var.models.packing import Packed, pack

# a pair of 2 and 1 tokens, one of 1 and 2, the better response first
LENGTHS = [2, 1, 1, 2]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5]  # means: −1.5, −4 | −3, −1.25
REFERENCE = [-2.0, -3.0, -4.5, -1.0, -2.0, -2.5]  # log-ratios: 2.0, 0.5 | −2.0, 2.0. Margins: 1.5, −4.0
HALVES = (slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 6))  # sequences and tokens of each pair


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Packed]:
    def build(lengths: Sequence[int], **extra: Any) -> Packed:
        """Sequences of one prompt token and so many response tokens. Divisors: of this batch, unless given."""
        divisors = {"global_tokens": float(sum(lengths)), "global_sequences": float(len(lengths))}
        return pack([[0, *range(1, n + 1)] for n in lengths], [1] * len(lengths), **{**divisors, **extra})

    return build


@pytest.fixture
def pairs(batch_of: Callable[..., Packed]) -> Packed:
    return batch_of(LENGTHS, reference_logps=torch.tensor(REFERENCE))


def value_and_gradient(loss: Callable[[Tensor], Tensor], logps: Tensor) -> tuple[Tensor, Tensor]:
    logps = logps.clone().requires_grad_(True)
    value = loss(logps)
    value.backward()
    assert logps.grad is not None
    return value.detach(), logps.grad


def loss_and_gradient(loss: Any, batch: Packed, logps: Sequence[float] = LOGPS) -> tuple[float, Any, dict[str, float]]:
    """In float64, with the metrics' means."""
    given = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    value, metrics = loss(given, batch)
    value.backward()
    return value.item(), given.grad, {name: float(total / number) for name, (total, number) in metrics.items()}


def kinds(loss: Any) -> set[type]:
    """Return the kinds of requirements of a loss."""
    return {type(requirement) for requirement in loss.requires}
