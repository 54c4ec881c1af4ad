"""AlignmentModule: one training step for every objective.

Sharding, gradient clipping and resuming are in `var/training/hooks.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from var.data.chat import Chat
from var.losses.base import Loss, Mean, Metrics
from var.models.frozen import FrozenModel
from var.models.packing import Packed
from var.models.policy import Policy
from var.models.reward_model import RewardModel
from var.models.sharding import use_sharded
from var.models.value_head import ActorCritic
from var.sampling.base import Sampling
from var.sampling.local import sample_tokens
from var.training.hooks import TrainingHooks
from var.training.schedule import Schedule
from var.utils.errors import UserError


class AlignmentModule(TrainingHooks):
    """A policy that trains, a loss, and optionally a live reference."""

    def __init__(
        self,
        policy: Policy | ActorCritic | RewardModel,
        loss: Loss,
        providers: Sequence[Any],
        optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        schedule: Schedule,
        reference: FrozenModel | None = None,
        nonfinite: Literal["stop", "skip"] = "stop",
        fill: Callable[[Any], None] | None = None,
        gather: bool = True,
    ) -> None:
        """Build the module.

        Args:
            policy: gives the loss log-probabilities; a RewardModel gives scores, an ActorCritic values too.
            loss: maps them and the batch to a scalar.
            providers: the providers of the loss's requirements, which complete the batch in each step.
            optimizer: makes the optimizer from parameters.
            schedule: of the learning rate.
            reference: runs in each step if it is given (reference=live). Otherwise the batch holds its numbers.
            nonfinite: what to do with an optimizer step whose gradient is not finite.
            fill: reads the weights of a model on the meta device, after it is sharded.
            gather: whether a sharded policy is gathered to sample from it. Otherwise each block is gathered for each
                token, which is slower and needs no memory for a complete model.
        """
        super().__init__(policy, optimizer, schedule, nonfinite, reference, fill)
        self.loss, self.providers, self.gather = loss, providers, gather

    def training_step(self, batch: Packed, _: int) -> Tensor:
        """Return this micro-batch's part of the optimizer step's loss.

        The loss divides by totals of the complete optimizer step, so parts add up. Lightning divides by the numbers of
        ranks and of accumulated micro-batches. Multiplying by both constants makes it a sum, also in a short last step.
        """
        with torch.no_grad():
            for provider in self.providers:
                batch = provider.at_step(batch, self.policy, self._live[0])
        outputs = self.policy(batch)  # [N] nats; [B] scores of a reward model; a pair with values of an ActorCritic
        if isinstance(outputs, tuple):
            outputs, batch = outputs[0], replace(batch, values=outputs[1])
        loss, metrics = self._compute_loss(outputs, with_sampling_policy(batch, outputs))
        # The logged mean over micro-batches is the step's loss again. A reward model has no target tokens.
        divisor = batch.global_tokens if len(batch.target) else batch.global_sequences
        metrics["loss"] = Mean(loss.detach() * divisor, float(len(outputs)))
        if batch.padding:  # it keeps the ranks in step and counts for nothing
            loss, metrics = (
                loss * 0.0,
                {name: Mean(0.0, 0.0) for name in metrics},
            )
        self.record(metrics)
        self._window.append((batch.ids, loss.detach()))
        return loss * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _compute_loss(self, outputs: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics. Explain what a loss outside the package is most likely to do wrong."""
        try:
            found = self.loss(outputs, batch)
        except (TypeError, AttributeError) as error:
            if "NoneType" in str(error):
                error.add_note("A field of the batch is None unless the loss lists it in `requires` (docs/batch.md).")
            raise
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and found[0].ndim == 0:
            return found
        raise UserError(
            f"the loss ({type(self.loss).__name__}) must return a tensor without dimensions and a dictionary of "
            f"metrics, which may be empty; it returned {type(found).__name__} (docs/losses.md)."
        )

    def record(self, metrics: Mapping[str, Mean]) -> None:
        """Add to what `take_metrics` will report."""
        for name, mean in metrics.items():
            pair = torch.stack([self._as_scalar(part) for part in mean])
            self._sums[name] = self._sums[name].to(pair) + pair if name in self._sums else pair
        self._totals = None

    def _as_scalar(self, value: Tensor | float) -> Tensor:
        """Return a float64 scalar on the device. A number is written there: copying it would wait for the device."""
        if isinstance(value, Tensor):
            return value.detach().double()
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def take_metrics(self) -> dict[str, float]:
        """Return the means since the last call, over micro-batches and ranks.

        Metrics with a count of zero are omitted, for example KTO's undesirable responses if there were none.
        """
        if self._totals is None:
            self.read_totals()
        totals, self._totals, self._sums = self._totals or {}, None, {}
        return {name: total / count for name, (total, count) in totals.items() if count}

    def generate(
        self,
        chat: Chat,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[list[int]]]:
        """Return the tokens of K responses to each encoded prompt, sampled from the policy as it is now.

        All ranks of a sharded policy call this together, each with its own prompts.
        """
        with use_sharded(self.policy, self.gather):
            return sample_tokens(self.policy.model, chat, prompts, sampling, advance)


def with_sampling_policy(batch: Packed, logps: Tensor) -> Packed:
    """Return the batch with the sampling policy's numbers. If it has none, the policy has not moved since sampling."""
    return replace(
        batch,
        old_logps=logps.detach() if batch.old_logps is None else batch.old_logps,
        old_values=batch.values.detach() if batch.values is not None and batch.old_values is None else batch.old_values,
    )
