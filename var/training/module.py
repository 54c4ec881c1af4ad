"""AlignmentModule: a policy, a loss, and optionally the live reference; one training step for every objective.
The learning rate's schedule."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from var.losses.base import Mean
from var.models.cross_scoring import cross_logps, mismatched_logps
from var.models.frozen import AdapterOff
from var.models.packing import Packed
from var.models.policy import Policy
from var.models.pretrained import blocks
from var.models.reward_model import RewardModel
from var.models.value_head import ActorCritic
from var.requirements import Need
from var.training.checkpoints import rescale_progress
from var.training.schedule import Schedule
from var.utils.console import warn
from var.utils.errors import UserError
from var.weights.table import micro_batch_inputs


class AlignmentModule(lightning.LightningModule):
    """policy: trained; its forward gives the loss log-probabilities (a RewardModel's, scores; an ActorCritic's, values
    too). loss: from them and the batch to a scalar. reference: run in each step where it is given (reference=live),
    else the batch carries what the loss needs of it. nonfinite: what becomes of an optimiser step without a finite
    gradient. fill: reads the weights of a model that has none yet, once it is sharded.
    """

    def __init__(
        self,
        policy: Policy | ActorCritic | RewardModel,
        loss: Callable[[Tensor, Packed], tuple[Tensor, dict[str, Mean]]],
        optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        schedule: Schedule,
        reference: Policy | AdapterOff | None = None,
        nonfinite: Literal["stop", "skip"] = "stop",
        fill: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.loss, self.optimizer, self.schedule = policy, loss, optimizer, schedule
        self._reference = [reference] if reference is not None else []  # a list: no parameters of ours, never saved
        self.nonfinite, self._fill = nonfinite, fill
        self.skipped = 0  # optimiser steps that were left out
        self.gradient_norm: Tensor | None = None  # of the last optimiser step, before it was clipped
        self.rate = 0.0  # of the last optimiser step; the optimiser's own is the next one's by the time it is logged
        self._window: list[tuple[tuple[str, ...], Tensor]] = []  # names and loss of its micro-batches
        self._sums: dict[str, Tensor] = {}
        self.strict_loading = all(p.requires_grad for p in policy.parameters())  # see on_save_checkpoint

    def training_step(self, batch: Packed, _: int) -> Tensor:
        """The share of this micro-batch in the loss of the whole optimiser step.

        Lightning takes the mean over ranks and accumulation; the loss is a share of a sum, so that mean is undone,
        by the constants Lightning divides by, in a short last step too.
        """
        for reference in self._reference:
            batch = self.with_live_reference(reference, batch)
        if Need.MISMATCHED_LOGPS in self.loss.needs:  # type: ignore[attr-defined]
            batch = replace(batch, mismatched_logps=mismatched_logps(self.policy, batch))
        outputs = self.policy(batch)  # [N] nats; a RewardModel's [B]; an ActorCritic's values too
        if isinstance(outputs, tuple):
            outputs, batch = outputs[0], replace(batch, values=outputs[1])
        loss, metrics = self.loss(outputs, with_sampling_policy(batch, outputs))
        whole = batch.global_tokens if len(batch.target) else batch.global_sequences
        metrics["loss"] = Mean(loss.detach() * whole, float(len(outputs)))
        if whole == float("inf"):  # a filler that keeps the ranks in step counts for nothing
            metrics = {name: Mean(torch.zeros_like(total), 0.0) for name, (total, _) in metrics.items()}
        self.record(metrics)
        self._window.append((batch.ids, loss.detach()))
        return loss * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def record(self, metrics: Mapping[str, Mean]) -> None:
        """Add to what take_metrics will report."""
        for name, (total, number) in metrics.items():
            pair = torch.stack([total, torch.as_tensor(number).to(total)]).detach().double()
            self._sums[name] = self._sums[name].to(pair) + pair if name in self._sums else pair

    def take_metrics(self) -> dict[str, float]:
        """The means since the last call, over micro-batches and ranks; one reduction for all of them.

        What nothing was counted of (KTO's undesirable rows, where there were none) is left out.
        """
        names = sorted(self._sums)
        sums = torch.stack([self._sums.pop(name) for name in names])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return {name: total / number for name, (total, number) in zip(names, sums.tolist(), strict=True) if number}

    @torch.no_grad()
    def with_live_reference(self, reference: Policy | AdapterOff, batch: Packed) -> Packed:
        """The batch with what the loss needs of the reference, computed now: as the paper trains."""
        needs = self.loss.needs  # type: ignore[attr-defined]
        if Need.REFERENCE_LOGPS in needs:
            batch = replace(batch, reference_logps=reference(batch))
        if Need.CROSS_LOGPS in needs:
            batch = replace(batch, cross_logps=cross_logps(reference, batch))
        if Need.MISMATCHED_LOGPS in needs:
            batch = replace(batch, mismatched_reference_logps=mismatched_logps(reference, batch))
        if batch.cross_rewards is not None:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            log_weights = self.loss.estimator(micro_batch_inputs(batch), data.temperature)  # type: ignore[attr-defined]
            batch = replace(batch, weights=(log_weights - data.log_mean_weight).exp().float())
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With what has been counted; of a run that trains an adapter without the frozen model, but a sharded one is
        whole."""
        checkpoint["skipped"], checkpoint["ranks"] = self.skipped, self.trainer.world_size
        names = sorted(self._sums)
        if names and torch.distributed.is_initialized():  # of all ranks, as only the first one's are saved
            sums = torch.stack([self._sums[name] for name in names])
            torch.distributed.all_reduce(sums)
            self._sums = dict(zip(names, sums * float(torch.distributed.get_rank() == 0), strict=True))
        checkpoint["metrics"] = self._sums  # since the last log: a resumed curve has the same points
        if not self.strict_loading and not isinstance(self.policy, FSDPModule):
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = checkpoint["skipped"]
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._sums = {name: sums * float(first) for name, sums in checkpoint["metrics"].items()}
        rescale_progress(checkpoint["loops"], checkpoint["ranks"], self.trainer.world_size)

    def on_fit_start(self) -> None:
        for reference in self._reference:
            reference.to(self.device)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By norm. Lightning's own refuses a fused optimizer under bf16-mixed, where no scaler is at work.

        A norm that is not finite is no step: see `nonfinite`. It is the same on every rank.
        """
        self.rate = optimizer.param_groups[0]["lr"]
        window, self._window = self._window, []
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        if not parameters:  # DeepSpeed keeps gradients, and clips them, by itself
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not self.gradient_norm.isfinite():
            self._left_out(window)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def _left_out(self, window: list[tuple[tuple[str, ...], Tensor]]) -> None:
        """Stop, naming the rows, or take the step's gradients and sums away and count it."""
        wrong = [names for names, loss in window if not loss.isfinite()]
        rows = [name for names in wrong or (names for names, _ in window) for name in names]
        what = "the loss" if wrong else "the gradient, of finite losses,"
        told = f"{what} is not finite in optimiser step {self.trainer.global_step + 1}, rows {', '.join(rows[:16])}" + (
            f" and {len(rows) - 16} more" if len(rows) > 16 else ""
        )
        if self.nonfinite == "stop":
            raise UserError(
                f"{told}. The model before it is in the last checkpoint. Look at these rows, lower the learning rate, "
                "or leave such steps out by trainer.nonfinite=skip"
            )
        warn(f"{told}; the step is left out.")
        for parameter in self.policy.parameters():
            parameter.grad = None
        self._sums = {
            name: sums if sums.isfinite().all() else torch.zeros_like(sums) for name, sums in self._sums.items()
        }
        self.skipped += 1

    def configure_model(self) -> None:
        """FSDP2, by the model's own blocks, where the strategy gives a device mesh."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None or isinstance(self.policy, FSDPModule):
            return
        axis = mesh["data_parallel"]
        for block in blocks(self.policy.model):
            fully_shard(block, mesh=axis)
        fully_shard(self.policy, mesh=axis)
        if self._fill is not None:
            device = self.trainer.strategy.root_device
            self.policy._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)
            self.policy.model.tie_weights()
            self._fill(self.policy.model)


def with_sampling_policy(batch: Packed, logps: Tensor) -> Packed:
    """A rollout that trains once comes without the sampling policy's numbers: the policy has not moved since."""
    return replace(
        batch,
        old_logps=logps.detach() if batch.old_logps is None else batch.old_logps,
        old_values=batch.values.detach() if batch.values is not None and batch.old_values is None else batch.old_values,
    )
