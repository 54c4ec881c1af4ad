"""The requirements that a loss can list.

A loss lists requirements in its property `requires`. A requirement is a frozen dataclass that carries the parameters
with which it is computed, and it names the class that provides it. Each provider is in one file of `var/annotate/` and
fills fields of the batch (`var.models.packing.Packed`). Nothing here imports torch, so a loss can be read and imported
alone.

To add a requirement, write one file with a dataclass like those below and its provider, a subclass of
`var.annotate.base.Provider`. `examples/length_penalty.py` is a complete example outside the package.

Shapes: N response tokens, B sequences and K responses per prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """The base of all requirements. Subclasses set the class attributes."""

    provider: ClassVar[str] = ""
    """The dotted name of the class that provides it."""
    shape: ClassVar[str] = ""
    """Its shape in a batch."""
    unit: ClassVar[str] = "-"
    """Its unit in a batch."""
    text: ClassVar[str] = ""
    """What it is, in words, for `debug=dry`."""

    @property
    def reads_reference(self) -> bool:
        """Whether it is computed from log-probabilities of π_ref, so that `reference=live` has an effect."""
        return False


Kind = TypeVar("Kind", bound=Requirement)


def find(requirements: Sequence[Requirement], kind: type[Kind]) -> Kind | None:
    """Return the requirement of this kind, or None if the loss does not have it."""
    return next((requirement for requirement in requirements if isinstance(requirement, kind)), None)


# Which responses train, and which of them stay together in a micro-batch.


@dataclass(frozen=True, kw_only=True)
class Pairs(Requirement):
    """The better and the worse response to a prompt, next to each other."""

    provider = "var.annotate.preferences.ProvidePairs"
    shape = "[B]"
    text = "the better and the worse response to a prompt, next to each other"


@dataclass(frozen=True, kw_only=True)
class Groups(Requirement):
    """All responses to a prompt in one micro-batch; `group` says which prompt a sequence answers."""

    provider = "var.annotate.preferences.ProvideGroups"
    shape = "[B]"
    text = "all responses to a prompt in one micro-batch"


@dataclass(frozen=True, kw_only=True)
class Desirable(Requirement):
    """Whether a response is to be imitated."""

    threshold: float | None = None
    """A response whose reward is above it is desirable. None: the better response of a pair is."""

    provider = "var.annotate.preferences.ProvideDesirable"
    shape = "[B]"
    text = "whether a response is to be imitated"


# Rewards, and what is computed from them before training.


@dataclass(frozen=True, kw_only=True)
class Rewards(Requirement):
    """The reward of each response to its own prompt. List it before requirements that are computed from rewards."""

    nonnegative: bool = False
    """Whether a negative reward is an error, because the loss uses rewards as weights."""

    provider = "var.annotate.rewards.ProvideRewards"
    shape = "[B]"
    unit = "reward"
    text = "the reward of each response to its own prompt"


@dataclass(frozen=True, kw_only=True)
class Weights(Requirement):
    """VAR's weight exp(r/λ) / Z(x) of each response, divided by its mean over the data set.

    In-batch weights of a live reference are not divided by it (`var/annotate/weights.py`).
    """

    estimator: Any
    """How Z(x) is estimated: one of `var.weights.estimators`."""
    temperature: float
    """λ > 0, in the unit of `temperature_unit`."""
    temperature_unit: Literal["reward", "sd"]
    """`reward`, or `sd` for the standard deviation of the reward within a prompt."""
    min_weight: float
    """Responses with a smaller weight are skipped, or thinned by roulette."""
    roulette: bool = False
    """Whether a response with a smaller weight w trains with probability w/min_weight, and then with min_weight."""

    provider = "var.annotate.weights.ProvideWeights"
    shape = "[B]"
    text = "exp(r/λ) / Z(x), of mean 1 over the data set"

    @property
    def reads_reference(self) -> bool:
        """Whether the estimator reads log-probabilities of π_ref."""
        return bool({"reference_logps", "cross_logps"} & set(self.estimator.inputs))


@dataclass(frozen=True, kw_only=True)
class WeightColumn(Requirement):
    """The weight that the data carries for each response."""

    provider = "var.annotate.weights.ProvideWeightColumn"
    shape = "[B]"
    text = "the weight that the data carries for each response"


@dataclass(frozen=True, kw_only=True)
class ValueFit:
    """How V(x), the reference's expected reward for a prompt, is fitted (`var/annotate/value_fit.py`)."""

    development_prompts: int
    """Prompts that V is fitted on. They are never trained on."""
    epochs: int
    """Passes over these prompts."""
    learning_rate: float
    """Of AdamW, in the fit."""
    heads: int
    """Attention heads. They divide the reference's hidden size."""
    batch: int
    """Prompts per step of the fit."""
    lowest: float
    """The lowest reward that can be predicted, on the run's scale."""
    largest: float
    """The largest reward that can be predicted, on the run's scale."""
    seed: int
    """Of the initial weights and of the order of prompts."""

    def __post_init__(self) -> None:
        if min(self.development_prompts, self.epochs, self.heads, self.batch) < 1 or not self.learning_rate > 0:
            raise UserError(
                "loss.value: development_prompts, epochs, heads and batch must be at least 1, and learning_rate above 0"
            )
        if not self.lowest < self.largest:
            raise UserError(f"loss.value.lowest={self.lowest} must be below loss.value.largest={self.largest}")


@dataclass(frozen=True, kw_only=True)
class Advantages(Requirement):
    """r − V(x), where V(x) is the expected reward of the reference's own responses."""

    value: ValueFit
    """How V(x) is fitted."""
    draw: Literal["all", "uniform", "priority"]
    """Which responses train: all; each of positive advantage once; or draws proportional to the positive advantage."""

    provider = "var.annotate.advantages.ProvideAdvantages"
    shape = "[B]"
    unit = "reward"
    text = "r − V(x), where V(x) is the expected reward of the reference's own responses"


# Log-probabilities of the reference.


@dataclass(frozen=True, kw_only=True)
class ReferenceLogps(Requirement):
    """log π_ref(y_t | x, y_<t) of each response token."""

    provider = "var.annotate.reference_logps.ProvideReferenceLogps"
    shape = "[N]"
    unit = "nats"
    text = "log π_ref of each response token"

    @property
    def reads_reference(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True, kw_only=True)
class MismatchedLogps(Requirement):
    """Log-probability of the next sequence's response under each prompt, of the policy and of the reference."""

    provider = "var.annotate.reference_logps.ProvideMismatchedLogps"
    shape = "[B]"
    unit = "nats"
    text = "log π of the next sequence's response under this prompt, of the policy and of the reference"

    @property
    def reads_reference(self) -> bool:
        """Always."""
        return True


# Responses that the policy samples while it trains.


@dataclass(frozen=True, kw_only=True)
class Rollout(Requirement):
    """The policy samples responses while it trains. The responses, with their rewards, are the next batches."""

    steps: int = 1
    """Optimizer steps whose responses are sampled at once. With more than 1, they come from an older policy."""
    passes: int = 1
    """How often each rollout is trained on."""

    provider = "var.annotate.rollouts.ProvideRollout"
    shape = "[B]"
    text = "responses that the policy samples while it trains"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.passes < 1:
            raise UserError("loss.rollout: steps and passes must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OldLogps(Requirement):
    """Log-probability of each response token under the policy that sampled it."""

    rollout: Rollout
    """When the policy moves between sampling and training, the numbers are kept from the time of sampling."""

    provider = "var.annotate.rollouts.ProvideOldLogps"
    shape = "[N]"
    unit = "nats"
    text = "log π of each response token, of the policy that sampled it"

    @property
    def policy_moves(self) -> bool:
        """Whether a batch can train after the policy that sampled it has changed."""
        return self.rollout.steps > 1 or self.rollout.passes > 1


# What the trained model returns.


@dataclass(frozen=True, kw_only=True)
class TokenValues(Requirement):
    """The value head's estimate before each response token, now and when the response was sampled."""

    provider = "var.annotate.rollouts.ProvideTokenValues"
    shape = "[N]"
    unit = "reward"
    text = "the value head's estimate before each response token"


@dataclass(frozen=True, kw_only=True)
class SequenceScores(Requirement):
    """The trained model returns one score per sequence in place of log-probabilities: it is a reward model."""

    provider = "var.annotate.sequence_scores.ProvideSequenceScores"
    shape = "[B]"
    unit = "reward"
    text = "the trained model's score of each sequence, in place of log-probabilities"
