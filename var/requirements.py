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
    GROUPS = Supply("[B]", "-", "data: all responses of a prompt side by side, their group in `group`")
    DESIRABLE = Supply("[B]", "-", "data: whether a response is one to imitate")
    ADVANTAGES = Supply("[B]", "reward", "r − V(x), V the expected reward of the reference's own answers")
    CANDIDATE_REWARDS = Supply("[G, K]", "reward", "reward: K responses of the reference to each prompt")
    MISMATCHED_LOGPS = Supply("[B]", "nats", "policy and reference: the next sequence's response under this prompt")
    SCALAR_HEAD = Supply("[B]", "reward", "the trained model: a scalar a sequence in place of log-probabilities")
    ROLLOUT = Supply("[B]", "-", "rollout: the responses themselves, sampled from the policy while it trains")
    OLD_LOGPS = Supply("[N]", "nats", "rollout: the policy that sampled, per token")
    VALUES = Supply("[N]", "reward", "the policy's value head, before each response token; now, and as it sampled")
    PROMPT_FEATURES = Supply("[B, 2H]", "-", "the reference's hidden states of the prompt, for V(x)")

    @property
    def key(self) -> str:
        return self.name.lower()
