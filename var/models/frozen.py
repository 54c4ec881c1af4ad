"""Frozen models: loaded when first needed, released when done, never trained."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from var.models.lora import adapter_off
from var.models.packing import Packed
from var.models.policy import Policy
from var.models.pretrained import Pretrained
from var.models.sharding import Lockstep, any_rank, gather_parameters, load_to_shard, shard, use_sharded
from var.models.value_head import ActorCritic, unwrap_value_head


class AdapterOff:
    """A frozen view of the model under a policy's adapter: the same weights, computed with the adapter off."""

    def __init__(self, policy: Policy | ActorCritic) -> None:
        self.policy = policy

    @property
    def model(self) -> Any:
        """The policy's transformers model, adapter included."""
        return self.policy.model

    @torch.no_grad()
    def __call__(self, batch: Packed) -> Tensor:
        """Return [N] nats, as `Policy.forward`."""
        with adapter_off(self.model):
            outputs = self.policy(batch)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def prompt_states(self, batch: Packed) -> list[Tensor]:
        """Return the hidden states of each segment, as `Policy.prompt_states`."""
        with adapter_off(self.model):
            return unwrap_value_head(self.policy).prompt_states(batch)

    def prompt_features(self, batch: Packed) -> Tensor:
        """Return the features of each segment, as `Policy.prompt_features`."""
        with adapter_off(self.model):
            return unwrap_value_head(self.policy).prompt_features(batch)

    def to(self, device: torch.device | str) -> "AdapterOff":
        """Move the policy, which holds the weights, to `device`."""
        if next(self.policy.parameters()).device != torch.device(device):
            self.policy.to(device)
        return self


class FrozenModel:
    """A pretrained model that is loaded when it is first needed and never trained; `release` frees its memory."""

    def __init__(
        self,
        pretrained: Pretrained,
        device: torch.device | str,
        autocast: torch.dtype | None = None,
        shard: bool = False,
    ) -> None:
        """Describe the model. Nothing is loaded.

        Args:
            pretrained: the model.
            device: where it runs.
            autocast: the dtype in which the policy of the run computes, or None.
            shard: whether to shard it over the ranks of the job, for a model that does not fit on each device.
        """
        self.pretrained, self.device, self.autocast, self.shard = pretrained, torch.device(device), autocast, shard
        self.keep = False
        """Whether `release` does nothing, for a model that runs in each training step."""
        self._adapter_off: AdapterOff | None = None
        self._lockstep: Lockstep | None = None

    @property
    def policy(self) -> Policy | AdapterOff:
        """The model, loaded at the first use."""
        if self._adapter_off is not None:
            return self._adapter_off.to(self.device)
        if self._sharded and "_loaded" not in vars(self):
            any_rank(True, self.device)  # the others load their part in `lockstep`
        return self._loaded

    @property
    def _sharded(self) -> bool:
        distributed = torch.distributed
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        return self.shard and several and self._adapter_off is None

    @cached_property
    def _loaded(self) -> Policy:
        with torch.inference_mode(False):  # FSDP writes to tensors that are made here, in any mode
            if self._sharded:
                return self._load_sharded()
            model = self.pretrained.load()
            if self.autocast is not None:  # before the device has to hold it
                cast_linear_weights(model, self.autocast)
            return Policy(model.to(self.device)).eval().requires_grad_(False)

    def _load_sharded(self) -> Policy:
        """Load this rank's part. No host or device holds the complete model."""
        pretrained, mesh = self.pretrained, init_device_mesh(self.device.type, (torch.distributed.get_world_size(),))
        if self.autocast is not None:  # parameters are gathered in this dtype, so that nothing more is rounded
            pretrained = replace(pretrained, dtype=str(self.autocast).removeprefix("torch."))
        model, fill = load_to_shard(pretrained)
        policy = Policy(model).eval().requires_grad_(False)
        shard(policy, mesh, self.autocast, self.device, fill)
        policy.to(self.device)
        gather_parameters(policy, [policy])  # of what is outside the blocks
        self._lockstep = Lockstep(policy, self.device)
        self._lockstep.join()  # allocates in a mode in which all modes can write
        return policy

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Let each rank use a sharded model as often as it needs to within the context; see `use_sharded`."""
        if self._adapter_off is not None:
            with use_sharded(self._adapter_off.policy, gather=False):
                yield
            return
        yield
        while self._sharded and any_rank(False, self.device):
            if "_loaded" in vars(self) and self._lockstep is not None:
                self._lockstep.join()
            else:
                self._loaded  # noqa: B018

    def share_weights(self, policy: Policy | ActorCritic) -> None:
        """Use the weights under the adapter of `policy`, which are this model's, in place of a second copy."""
        self._adapter_off = AdapterOff(policy)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the model's results depend on."""
        fingerprint = {**self.pretrained.fingerprint, "autocast": str(self.autocast)}
        if self.is_low_precision:
            fingerprint |= {"attention": self.pretrained.kernel, "compile": self.pretrained.compile}
        return fingerprint

    @property
    def is_low_precision(self) -> bool:
        """Whether results depend, by hundredths of a nat, on the kernel that computes them. In float32 they do not."""
        return self.autocast is not None or self.pretrained.dtype not in ("float32", "float64")

    def precision(self) -> AbstractContextManager[Any]:
        """Return a context in which the model computes in the arithmetic of the policy's training steps."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def release(self) -> None:
        """Free the loaded model, unless it is kept. The next use loads it again."""
        if not self.keep and self.__dict__.pop("_loaded", None) is not None:
            self._lockstep = None
            free_memory()


def free_memory() -> None:
    """Return the memory of objects that are not used any more to the device."""
    gc.collect()  # a sharded model refers to itself
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def cast_linear_weights(model: Any, dtype: torch.dtype) -> None:
    """Convert the weights and biases of linear layers to `dtype` in place, as autocast does at each use of them.

    Autocast keeps a converted copy only of weights that train. Under autocast, the model's results stay the same to the
    last bit, and it can no longer run without it. Embeddings, norms, the output head and quantized layers stay as they
    are. The output head is outside the base model, and its logits need more precision.
    """
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for module in model.base_model.modules():
        if type(module) is torch.nn.Linear and id(module) not in ends:
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.to(dtype)
