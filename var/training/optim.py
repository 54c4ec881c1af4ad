"""MasterAdamW: AdamW on float32 copies of a model's parameters, which may lie in the host's memory."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose steps are taken on float32 copies, of which the parameters are the rounded image.

    A parameter in bfloat16 alone stands still where a step is under 1/256 of it, which at the paper's rates is most of
    them; its copy moves. Gradients are read in the parameters' own dtype, accumulated micro-batches included, and
    clipped there.

    device: where copies and moments lie, 12 bytes a parameter; None: beside the parameters. `cpu` leaves the GPU with
    parameters and gradients, 4 bytes a parameter in bfloat16, and sends as many over the bus in each step.
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
        self.parameters = list(params)
        self.device = None if device is None else torch.device(device)
        copies = [nn.Parameter(self._copied(p)) for p in self.parameters]
        super().__init__(copies, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    def _copied(self, parameter: Tensor) -> Tensor:
        """float32, or better where the parameter is; never the parameter's own memory."""
        precise = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.detach().to(self.device or parameter.device, precise, copy=True)

    @property
    def masters(self) -> list[Tensor]:
        """In the order of the parameters."""
        return [copy for group in self.param_groups for copy in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """As torch.optim.AdamW's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for copy, parameter in zip(self.masters, self.parameters, strict=True):
            copy.grad = None if parameter.grad is None else self._copied(parameter.grad)
            for name, moment in self.state[copy].items() if self.device else ():
                self.state[copy][name] = moment.to(self.device)  # Lightning brings loaded ones to its own device
        super().step()
        for copy, parameter in zip(self.masters, self.parameters, strict=True):
            copy.grad = None
            parameter.copy_(copy)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the parameters; the copies' gradients live within `step` alone."""
        for parameter in self.parameters:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.detach_().zero_()

    def state_dict(self) -> dict[str, Any]:
        """With the copies: what a resumed run would lose in reading them from rounded parameters."""
        return {**super().state_dict(), "masters": [copy.detach() for copy in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of state_dict."""
        masters = state_dict["masters"]
        super().load_state_dict({name: part for name, part in state_dict.items() if name != "masters"})
        for copy, saved in zip(self.masters, masters, strict=True):
            copy.copy_(saved)


def state_size(kind: Any, width: int) -> int:
    """Bytes that an optimiser keeps for a parameter of `width` bytes: Adam's two moments, MasterAdamW's with the copy.
    0 where it is another, of which nothing is known."""
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Adam):
        return 0
    return 3 * max(width, 4) if issubclass(kind, MasterAdamW) else 2 * width
