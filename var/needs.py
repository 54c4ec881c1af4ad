"""What a loss can ask for, and who brings it."""

from enum import Enum
from typing import NamedTuple


class Supply(NamedTuple):
    shape: str
    unit: str
    writer: str


class Need(Enum):
    """One row a need: shape in a batch, unit, writer. N response tokens, B sequences."""

    PAIRS = Supply("[B]", "-", "data: the better and the worse response of a prompt side by side")
    WEIGHT_COLUMN = Supply("[B]", "-", "data: a weight with each response")
    REWARDS = Supply("[B]", "reward", "reward: the own pairs")
    CROSS_REWARDS = Supply("[B, B]", "reward", "reward: every response of a micro-batch under every prompt of it")
    REFERENCE_LOGPS = Supply("[N]", "nats", "the reference, its own pairs, per token")
    CROSS_LOGPS = Supply("[B, B]", "nats", "the reference, every response under every prompt, summed")
    PROMPT_FEATURES = Supply("[B, 2H]", "-", "the reference's hidden states of the prompt, for V(x)")

    @property
    def key(self) -> str:
        return self.name.lower()
