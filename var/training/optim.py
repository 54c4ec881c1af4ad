"""MasterAdamW: AdamW on float32 copies of a model's parameters, which can be in host memory."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies. The parameters are the rounded copies.

    A bfloat16 parameter does not change if a step is below 1/256 of it, which at the paper's learning rates is the case
    for most of them. Its float32 copy does change. Gradients are accumulated and clipped in the parameters' dtype.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
        device: Literal["cpu"] | None = None,
    ) -> None:
        """Build the optimizer. Arguments are those of torch.optim.AdamW, and `device`.

        Args:
            params: the parameters.
            lr: the learning rate.
            betas: decay rates of the moments.
            eps: added to the denominator.
            weight_decay: decoupled.
            fused: whether to use the fused kernel.
            device: where copies and moments are, 12 bytes per parameter; None for the parameters' device. With `cpu`
                the GPU holds parameters and gradients, 4 bytes per parameter in bfloat16, and transfers as many bytes
                in each step.
        """
        self.parameters = list(params)
        self.device = None if device is None else torch.device(device)
        copies = [nn.Parameter(self._copied(p)) for p in self.parameters]
        super().__init__(copies, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    def _copied(self, parameter: Tensor) -> Tensor:
        """Return a copy in float32, or in the parameter's dtype if that is more precise."""
        precise = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.detach().to(self.device or parameter.device, precise, copy=True)

    @property
    def masters(self) -> list[Tensor]:
        """The copies, in the order of the parameters."""
        return [copy for group in self.param_groups for copy in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step on the copies, and round them into the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for copy, parameter in zip(self.masters, self.parameters, strict=True):
            copy.grad = None if parameter.grad is None else self._copied(parameter.grad)
            for name, moment in self.state[copy].items() if self.device else ():
                self.state[copy][name] = moment.to(self.device)  # Lightning moves loaded ones to its own device
        super().step()
        for copy, parameter in zip(self.masters, self.parameters, strict=True):
            copy.grad = None
            parameter.copy_(copy)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the parameters' gradients. The copies have gradients only within `step`."""
        for parameter in self.parameters:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.detach_().zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the copies, which rounded parameters could not restore."""
        return {**super().state_dict(), "masters": [copy.detach() for copy in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state and copies."""
        masters = state_dict["masters"]
        super().load_state_dict({name: part for name, part in state_dict.items() if name != "masters"})
        for copy, saved in zip(self.masters, masters, strict=True):
            copy.copy_(saved)


def state_size(kind: Any, width: int) -> int:
    """Return the bytes that an optimizer keeps per parameter of `width` bytes, or 0 if it is not known.

    That is Adam's two moments, and the copy of MasterAdamW.
    """
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Adam):
        return 0
    return 3 * max(width, 4) if issubclass(kind, MasterAdamW) else 2 * width
