"""Frozen models: loaded when first needed, released when done, never trained."""

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from var.models.lora import adapter_off
from var.models.packing import Packed
from var.models.policy import Policy
from var.models.pretrained import Pretrained
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
    """A pretrained model that is loaded when it is first needed and never trained; `release` frees its memory.

    autocast is the dtype in which the policy of the run computes, or None.
    """

    def __init__(self, pretrained: Pretrained, device: torch.device | str, autocast: torch.dtype | None = None) -> None:
        self.pretrained, self.device, self.autocast = pretrained, torch.device(device), autocast
        self._adapter_off: AdapterOff | None = None

    @property
    def policy(self) -> Policy | AdapterOff:
        """The model, loaded at the first use."""
        return self._loaded if self._adapter_off is None else self._adapter_off.to(self.device)

    @cached_property
    def _loaded(self) -> Policy:
        policy = Policy(self.pretrained.load().to(self.device)).eval().requires_grad_(False)
        if self.autocast is not None:
            cast_linear_weights(policy.model, self.autocast)
        return policy

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
        """Free the loaded model. The next use loads it again."""
        self.__dict__.pop("_loaded", None)


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
