"""How a requirement of a loss is provided: the steps, and what the providers share.

The data module runs these steps for all providers, in the order in which the loss lists its requirements. An online
loss has no sequences before training, so only `check_rows`, `at_step` and `at_rollout` run for it.

    check_rows     reject rows that cannot be annotated, before anything is computed
    check_choice   reject responses that cannot be annotated
    select         before the plan: compute what needs no micro-batches, and say which sequences train
    check_plan     reject micro-batches that cannot be annotated
    compute        after the plan: compute, or read from the cache, what needs the micro-batches
    batch_fields   put the numbers of a micro-batch on the batch
    at_step        in the training step: compute what changes with the policy, or comes from a live reference
    at_rollout     on responses that the policy has just sampled

A provider overrides the steps that it needs.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch

from var.annotate.annotator import Annotator
from var.data.choice import Choice
from var.data.plan import ABSENT, Plan
from var.data.report import DataReport
from var.data.rows import Rows
from var.data.sequences import Sequences, encode
from var.data.settings import DataSettings
from var.models.attention import check_lengths
from var.models.packing import Packed
from var.requirements import Requirement
from var.rewards.scale import Scale
from var.sampling.base import Sampling
from var.utils.errors import UserError

Unit = Literal["sequence", "pair", "group"]
R = TypeVar("R", bound=Requirement)


@dataclass
class TrainingSet:
    """A data set on its way to training, as the providers see it. The data module fills it from top to bottom."""

    annotator: Annotator
    """Computes numbers or reads them from the cache."""
    sampling: Sampling
    """How the reference samples responses."""
    scale: Scale
    """The scale of rewards in this run."""
    settings: DataSettings
    """How rows become sequences and micro-batches."""
    live: bool
    """Whether the reference runs in each training step, so its log-probabilities are neither computed before training
    nor read from the cache.
    """
    unit: Unit = "sequence"
    """What a micro-batch counts: a sequence, a pair, or all responses to a prompt."""
    report: DataReport = field(default_factory=DataReport)
    """What was found in the data."""
    validation: Rows = field(init=False)
    """Rows of the validation prompts, one per prompt."""
    rows: Rows = field(init=False)
    """The training rows, with responses."""
    development: Rows = field(init=False)
    """Rows that a value estimate is fitted on, one per prompt. They are never trained on."""
    choice: Choice = field(init=False)
    """Which responses train."""
    sequences: Sequences = field(init=False)
    """The same as tokens: n sequences."""
    rewards: torch.Tensor | None = None
    """[n] float64 on the run's scale. The provider of `Rewards` sets it."""
    weights: torch.Tensor | None = None
    """[n] float64. The provider of `Weights` sets it."""
    plan: Plan = field(init=False)
    """The micro-batches and optimizer steps."""
    members: np.ndarray = field(init=False)
    """[M, W] int: the sequences of each micro-batch, ABSENT where it is short."""

    def require_rewards(self, requirement: Requirement) -> torch.Tensor:
        """Return the rewards. Raise UserError if the loss lists `requirement` without `Rewards()` before it."""
        if self.rewards is None:
            name = type(requirement).__name__
            raise UserError(f"{name} is computed from rewards: list Rewards() before {name}() in the loss's `requires`")
        return self.rewards

    def encode(self, rows: Rows, choice: Choice, pairs: bool) -> Sequences:
        """Return the chosen responses as tokens, with this run's template and limits."""
        settings, annotator = self.settings, self.annotator
        return encode(
            rows, choice, annotator.chat, settings.max_length, settings.overlong, pairs, annotator.cache,
            settings.on_template_change,
        )  # fmt: skip

    @property
    def shares_prompts(self) -> bool:
        """Whether responses to one prompt are always neighbors, so that it can be packed once for all of them."""
        return self.unit != "sequence"

    def check_lengths(self, longest: int, what: str) -> None:
        """Raise UserError if the model cannot process `what` of `longest` tokens."""
        check_lengths(self.annotator.reference.pretrained.config, int(longest), what)

    def check_cross_lengths(self) -> None:
        """Raise UserError if a prompt with another response of its micro-batch is too long for the model."""
        present = self.members != ABSENT
        prompt, response = (
            np.where(present, part[self.members], 0).max(1) for part in (self.sequences.start, self.sequences.length)
        )
        self.check_lengths((prompt + response).max(), "prompt with a response of its micro-batch")


class Provider(Generic[R]):
    """Computes one requirement and puts it on the batch. The steps do nothing unless a subclass overrides them."""

    unit: ClassVar[Unit] = "sequence"
    """The unit that the requirement asks for. Units other than `sequence` exclude each other."""

    def __init__(self, requirement: R) -> None:
        self.requirement = requirement

    @property
    def both_responses(self) -> bool:
        """Whether the better and the worse response of each row train."""
        return False

    @property
    def development_prompts(self) -> int:
        """How many prompts are kept from training to fit an estimate."""
        return 0

    def check_rows(self, data: TrainingSet, rows: Rows) -> None:
        """Raise UserError if these rows cannot be annotated."""

    def check_choice(self, data: TrainingSet) -> None:
        """Raise UserError if `data.choice` cannot be annotated."""

    def select(self, data: TrainingSet) -> np.ndarray | None:
        """Compute what needs no plan. Return the sequences to train on, or None for all of them.

        Selections of several providers are intersected. One that draws with replacement repeats sequences, so list it
        last. Count what does not train in `data.report`; a requirement outside the package uses its `extra`.
        """
        return None

    def check_plan(self, data: TrainingSet) -> None:
        """Raise UserError if `data.plan` cannot be annotated."""

    def compute(self, data: TrainingSet) -> None:
        """Compute what needs the plan."""

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return fields of the batch of this micro-batch by name. Names that `Packed` lacks are put in its `extra`.

        Args:
            data: the training set.
            micro_batch: its number in the plan.
            members: [B] its sequences.
        """
        return {}

    def at_step(self, batch: Packed, policy: Any, reference: Any) -> Packed:
        """Return the batch with what is computed in the training step. reference: None unless it is live."""
        return batch

    def at_rollout(self, batch: Packed, policy: Any, reference: Any) -> Packed:
        """Return a batch of just sampled responses with what is computed from the policy or the FrozenModel."""
        return batch


def make_providers(requirements: tuple[Requirement, ...]) -> list[Provider[Any]]:
    """Return the provider of each requirement, in order."""
    providers = []
    for requirement in requirements:
        module, _, name = requirement.provider.rpartition(".")
        try:
            providers.append(getattr(import_module(module), name)(requirement))
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{type(requirement).__name__}.provider={requirement.provider!r} cannot be imported ({error}). It must "
                "be the dotted name of a Provider; put the folder of its module on PYTHONPATH."
            ) from error
    return providers


def unit_of(providers: list[Provider[Any]]) -> Unit:
    """Return the unit of the plan. Raise UserError if requirements ask for different ones."""
    units = {provider.unit for provider in providers} - {"sequence"}
    if len(units) > 1:
        raise UserError(f"this loss asks for units that exclude each other: {', '.join(sorted(units))}")
    return units.pop() if units else "sequence"
