"""FSDP2: shard a model by its blocks, use a sharded model without training it, and gather its weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from var.models.logprobs import compute_hidden_states
from var.models.lora import has_adapter
from var.models.packing import whole
from var.models.pretrained import Pretrained
from var.models.structure import blocks, untied_weights
from var.utils.console import warn


def load_to_shard(pretrained: Pretrained) -> tuple[Any, Callable[[Any], None] | None]:
    """Return a model to be sharded, and the function that reads its weights after that.

    The function is None if no host can read a part of the weights, so that each process loads the complete model.
    """
    if pretrained.base is None:
        model = pretrained.build_empty()
        if pretrained.can_fill(model):
            return model, pretrained.fill
        warn("strategy=fsdp: the model's files use other weight names, so each process loads the complete model")
    return pretrained.load(), None


def shard(
    policy: Any,
    mesh: Any,
    dtype: torch.dtype | None,
    device: torch.device,
    fill: Callable[[Any], None] | None = None,
) -> None:
    """Shard a policy over the ranks of `mesh`, block by block.

    Args:
        policy: the policy, whose `model` is a transformers model.
        mesh: a device mesh with one dimension.
        dtype: the dtype of an autocast in which the policy runs; None without one. Parameters are then gathered in
            `dtype`, so that autocast makes no second copy of them, and gradients are reduced in float32. The residual
            stream is float32, as it is without sharding.
        device: where this rank's part lives.
        fill: reads the weights of a model on the meta device. None if they are already there.
    """
    precision = MixedPrecisionPolicy()
    if dtype is not None:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(policy.model):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    if dtype is not None:
        policy.model.get_input_embeddings().register_forward_hook(_return_float32)
    if fill is not None:
        policy._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)
        policy.model.tie_weights()
        fill(policy.model)


def _return_float32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Cast the output of a module to float32, as a forward hook."""
    return output.float()


class Lockstep:
    """Lets ranks run a sharded model different numbers of times.

    Running a block gathers its parameters from all ranks, so all have to run it together. Before each run of the
    backbone, a rank announces it. A rank that is done calls `drain`, and takes part in the others' runs with one token.
    The parameters outside the blocks (embeddings, last norm and head) have to stay gathered meanwhile.
    """

    def __init__(self, policy: Any, device: torch.device) -> None:
        """Announce each run of the policy's backbone from now on.

        Args:
            policy: the sharded policy.
            device: its device.
        """
        self.policy, self.device = policy, device
        self._draining = False
        self._hook = policy.model.base_model.register_forward_pre_hook(lambda *_: self._announce())

    def _announce(self) -> None:
        if not self._draining:
            any_rank(True, self.device)

    @torch.no_grad()
    def join(self) -> None:
        """Take part in one run of another rank."""
        dtype = self.policy._get_fsdp_state()._mp_policy.param_dtype
        self._draining = True
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            compute_hidden_states(self.policy.model.base_model, whole([[0]]).to(self.device))
        self._draining = False

    def drain(self) -> None:
        """Take part in the runs of other ranks, until all ranks have called this."""
        while any_rank(False, self.device):
            self.join()

    def close(self) -> None:
        """Announce no more runs."""
        self._hook.remove()


def any_rank(value: bool, device: torch.device) -> bool:
    """Return whether `value` is true on any rank. A rank whose own value is true does not wait for the others."""
    flag = torch.tensor(float(value), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return value or bool(flag)


def gather_parameters(policy: Any, parts: Iterable[Any]) -> None:
    """Gather the parameters of parts of a sharded policy, and keep them gathered."""
    policy._get_fsdp_state()._lazy_init()  # the root module is not known before the first forward
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


@contextmanager
def use_sharded(policy: nn.Module, gather: bool) -> Iterator[None]:
    """Let each rank use a sharded policy, or parts of it, as often as it needs to within the context.

    All ranks must enter and leave it together, and use no other model or collective within it. A policy without FSDP
    is left unchanged.

    Args:
        policy: the policy.
        gather: whether to keep all parameters gathered. The complete model, in the dtype of an autocast, then has to
            fit on each device. Otherwise each block is gathered whenever it runs, and the ranks run in lockstep.
    """
    if not isinstance(policy, FSDPModule):
        yield
        return
    modules: Any = policy.modules() if gather else [policy]
    parts = [part for part in modules if isinstance(part, FSDPModule)]
    gather_parameters(policy, parts)
    state = policy._get_fsdp_state()
    lockstep = None if gather else Lockstep(policy, state._device)
    try:
        yield
        if lockstep is not None:
            lockstep.drain()
    finally:
        if lockstep is not None:
            lockstep.close()
        for part in parts:
            part.set_reshard_after_forward(part is not policy, recurse=False)  # the default of fully_shard
            part.reshard()
        # A backward pass gathers a block ahead, by the order of all forwards, and that now differs between the ranks.
        state._comm_ctx.post_forward_order.clear()


def gather_weights(model: Any, dtype: torch.dtype, first: bool) -> dict[str, Tensor] | None:
    """Return the complete weights of a model in `dtype`, in the first rank's host memory; others get an empty dict.

    One tensor at a time is gathered on the device. Of a model with an adapter, only what trains is returned, in its own
    dtype. The result is None if the model itself is complete and has the dtype. All ranks call this together.
    """
    adapted, weights = has_adapter(model), untied_weights(model)
    if adapted:
        weights = {name: weights[name] for name, weight in model.named_parameters() if weight.requires_grad}
    sharded = any(isinstance(weight, DTensor) for weight in weights.values())
    if not sharded and (adapted or all(w.dtype == dtype for w in weights.values() if w.is_floating_point())):
        return None
    state = {}
    for name, weight in weights.items():
        complete = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if first:
            convert = complete.is_floating_point() and not adapted
            state[name] = complete.detach().to("cpu", dtype if convert else complete.dtype)
    return state
