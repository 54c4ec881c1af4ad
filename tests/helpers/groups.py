"""Groups of responses for the tests of InfoNCA and NCA."""

from typing import Any

from torch import Tensor

from tests.helpers.losses import double, make_batch, minimize
from var.models.packing import Packed

# A prompt with three responses (2, 1, 1 tokens) and a prompt with two (2, 1).
GROUP_LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -1.0]
# Metrics at α = β = 1/2, where r_θ = 1, 0.25, −1 | 1, 0.25 and the target is the softmax of r/α = 2, 0, 1 | 0, 6.
TARGET = [0.6652409558, 0.0900305732, 0.2447284711, 0.0024726232, 0.9975273768]
GROUP_METRICS = {
    "nll": 13.5 / 7,
    "implicit_reward/mean": 1.5 / 5,
    "implicit_reward/target": (TARGET[0] + 0.25 * TARGET[1] - TARGET[2] + TARGET[3] + 0.25 * TARGET[4]) / 2,
}


def make_groups() -> Packed:
    """Return these groups. The log-ratios are 2, 0.5, −2 | 2, 0.5."""
    return make_batch(
        [2, 1, 1, 2, 1], group=[0, 0, 0, 1, 1], global_groups=2.0, rewards=[1.0, 0.0, 0.5, 0.0, 3.0],
        reference_logps=[-2.0, -3.0, -4.5, -1.0, -2.0, -2.5, -1.5],
    )  # fmt: skip


# Four responses of one token. Eight draws represent π_ref exactly, so one group is its whole distribution.
DRAWS = [0, 0, 0, 0, 1, 1, 2, 3]
POPULATION = double([0.5, 0.25, 0.125, 0.125])
VALUES = double([0.3, 1.0, -0.5, 2.0])


def find_optimum(loss: Any) -> Tensor:
    """Return π_θ [4] at the minimum over tables, where the reference is POPULATION and the rewards are VALUES."""
    reference, rewards = POPULATION.log()[DRAWS], VALUES[DRAWS]
    batch = make_batch([1] * 8, group=[0] * 8, reference_logps=reference, rewards=rewards)
    return minimize(lambda logps: loss(logps[DRAWS], batch)[0], 4)
