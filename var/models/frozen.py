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
    """The model that a policy adapts, as its reference: the same weights, the adapter off, nothing trained."""

    def __init__(self, policy: Policy | ActorCritic) -> None:
        self.policy = policy

    @property
    def model(self) -> Any:
        return self.policy.model

    @torch.no_grad()
    def __call__(self, batch: Packed) -> Tensor:
        """As a Policy's forward."""
        with adapter_off(self.model):
            outputs = self.policy(batch)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def prompt_states(self, batch: Packed) -> list[Tensor]:
        """As a Policy's."""
        with adapter_off(self.model):
            return unwrap_value_head(self.policy).prompt_states(batch)

    def prompt_features(self, batch: Packed) -> Tensor:
        """As a Policy's."""
        with adapter_off(self.model):
            return unwrap_value_head(self.policy).prompt_features(batch)

    def to(self, device: torch.device | str) -> "AdapterOff":
        """Moves the policy: it is the same model."""
        if next(self.policy.parameters()).device != torch.device(device):
            self.policy.to(device)
        return self


class FrozenModel:
    """The frozen reference: loaded when first needed, let go with `release`. autocast: as the policy trains."""

    def __init__(self, pretrained: Pretrained, device: torch.device | str, autocast: torch.dtype | None = None) -> None:
        self.pretrained, self.device, self.autocast = pretrained, torch.device(device), autocast
        self._adapted: AdapterOff | None = None

    @property
    def policy(self) -> Policy | AdapterOff:
        return self._loaded if self._adapted is None else self._adapted.to(self.device)

    @cached_property
    def _loaded(self) -> Policy:
        return Policy(self.pretrained.load().to(self.device)).eval().requires_grad_(False)

    def is_under(self, policy: Policy | ActorCritic) -> None:
        """The policy adapts this very model: its weights serve as the reference, and no second copy is loaded."""
        self._adapted = AdapterOff(policy)

    @property
    def identity(self) -> dict[str, Any]:
        identity = {**self.pretrained.identity, "autocast": str(self.autocast)}
        if self.rounds:
            identity |= {"attention": self.pretrained.attention, "compile": self.pretrained.compile}
        return identity

    @property
    def rounds(self) -> bool:
        """In bf16 what computes a number shows in it, by hundredths of a nat; in fp32 every way gives the same."""
        return self.autocast is not None or self.pretrained.dtype not in ("float32", "float64")

    def precision(self) -> AbstractContextManager[Any]:
        """The arithmetic of the policy's own steps."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def release(self) -> None:
        self.__dict__.pop("_loaded", None)
