"""What surrounds the training step: sharding, the optimizer, gradient clipping, non-finite steps and checkpoints."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from var.models.frozen import FrozenModel
from var.models.policy import Policy
from var.models.reward_model import RewardModel
from var.models.sharding import shard
from var.models.value_head import ActorCritic
from var.training.checkpoints import rescale_progress
from var.training.schedule import Schedule
from var.utils.console import warn
from var.utils.errors import UserError


class TrainingHooks(lightning.LightningModule):
    """The hooks of `AlignmentModule` that Lightning calls around its training step."""

    def __init__(
        self,
        policy: Policy | ActorCritic | RewardModel,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        schedule: Schedule,
        nonfinite: Literal["stop", "skip"],
        reference: FrozenModel | None,
        fill: Callable[[Any], None] | None,
    ) -> None:
        super().__init__()
        self.policy, self.optimizer, self.schedule = policy, optimizer, schedule
        self.nonfinite, self._fill = nonfinite, fill
        self._reference = reference
        self._live: list[Any] = [None]  # in a list: its parameters are not the module's and are never saved
        self.skipped = 0
        """Optimizer steps that were skipped because they were not finite."""
        self.gradient_norm: float | None = None
        """The gradient norm of the last optimizer step, before clipping."""
        self.rate = 0.0
        """The learning rate of the last optimizer step. The optimizer's own is the next step's when it is logged."""
        self._window: list[tuple[tuple[str, ...], Tensor]] = []  # names and loss of the step's micro-batches
        self._sums: dict[str, Tensor] = {}  # of metrics since the last log: total and count, float64 on the device
        self._totals: dict[str, tuple[float, float]] | None = None  # the same over all ranks; None until they are read
        self.strict_loading = all(p.requires_grad for p in policy.parameters())  # see on_save_checkpoint

    def configure_model(self) -> None:
        """Shard the policy by its blocks (FSDP2), if the strategy has a device mesh."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None or isinstance(self.policy, FSDPModule):
            return
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        shard(self.policy, mesh["data_parallel"], dtype, self.trainer.strategy.root_device, self._fill)

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the trained parameters, and its schedule per optimizer step."""
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        self._hyperparameters = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def apply_hyperparameters(self, names: Iterable[str]) -> None:
        """Replace what a checkpoint restored by the optimizer's settings `names`, and by the schedule as it is now.

        The scheduler keeps its position. It would otherwise keep its peak rate too, and the first step would have the
        rate that the earlier schedule gave it, which is 0 after its end.
        """
        groups = self.trainer.optimizers[0].param_groups
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        for group, wanted in zip(groups, self._hyperparameters, strict=True):
            group.update({name: wanted[name] for name in names}, initial_lr=wanted["lr"])
        scheduler.base_lrs = [wanted["lr"] for wanted in self._hyperparameters]
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
        scheduler._last_lr = [peak * factor for peak in scheduler.base_lrs]
        for group, rate in zip(groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def on_fit_start(self) -> None:
        """Load a live reference, for the complete training."""
        if self._reference is not None:
            self._reference.keep = True
            self._live[0] = self._reference.policy

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm. Skip or stop at a norm that is not finite; it is the same on every rank.

        The host waits for the device once per optimizer step, here.
        Lightning's own clipping rejects a fused optimizer under bf16-mixed, where no gradient scaler is used.
        """
        self.rate = optimizer.param_groups[0]["lr"]
        window, self._window = self._window, []
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        if not parameters:  # DeepSpeed keeps and clips gradients by itself
            self.read_totals()
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.gradient_norm = self.read_totals(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(self.gradient_norm):
            self._skip_step(window)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def read_totals(self, norm: Tensor | None = None) -> float:
        """Read the metrics' sums over ranks, and a norm, with one copy to the host.

        Return the norm, or 0 without one.
        """
        names = sorted(self._sums)
        empty = torch.zeros(0, dtype=torch.float64, device=self.device)
        sums = torch.cat([empty, *(self._sums[name].to(empty) for name in names)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *values, result = torch.cat([sums, sums.new_zeros(1) if norm is None else norm.to(sums)[None]]).tolist()
        self._totals = dict(zip(names, zip(values[0::2], values[1::2], strict=True), strict=True))
        return float(result)

    def _skip_step(self, window: list[tuple[tuple[str, ...], Tensor]]) -> None:
        """Raise UserError with the step's rows, or drop its gradients, reset nonfinite metric sums, and count it."""
        nonfinite = [names for names, loss in window if not loss.isfinite()]
        rows = [name for names in nonfinite or (names for names, _ in window) for name in names]
        what = "the loss" if nonfinite else "the gradient (of finite losses)"
        text = f"{what} is not finite in optimizer step {self.trainer.global_step + 1}, rows {', '.join(rows[:16])}" + (
            f" and {len(rows) - 16} more" if len(rows) > 16 else ""
        )
        if self.nonfinite == "stop":
            raise UserError(
                f"{text}. Look at these rows, lower the learning rate, or skip such steps with trainer.nonfinite=skip. "
                "The last checkpoint, if there is one, is of an earlier step."
            )
        warn(f"{text}; the step is skipped.")
        for parameter in self.policy.parameters():
            parameter.grad = None
        self._sums = {
            name: sums if sums.isfinite().all() else torch.zeros_like(sums) for name, sums in self._sums.items()
        }
        self._totals = None
        self.skipped += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counts and metrics, and remove a frozen model under an adapter. A sharded model is saved completely."""
        checkpoint["skipped"], checkpoint["ranks"] = self.skipped, self.trainer.world_size
        names = sorted(self._sums)
        if names and torch.distributed.is_initialized():  # summed over ranks, since only the first one's are saved
            sums = torch.stack([self._sums[name] for name in names])
            torch.distributed.all_reduce(sums)
            self._sums = dict(zip(names, sums * float(torch.distributed.get_rank() == 0), strict=True))
        checkpoint["metrics"] = self._sums  # since the last log: a resumed curve has the same points
        if not self.strict_loading and not isinstance(self.policy, FSDPModule):
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counts and metrics, and the progress for this number of ranks."""
        self.skipped = checkpoint["skipped"]
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._sums = {name: sums * float(first) for name, sums in checkpoint["metrics"].items()}
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rescale_progress(checkpoint["loops"], lambda count: data.convert_progress(count, checkpoint["ranks"]))
