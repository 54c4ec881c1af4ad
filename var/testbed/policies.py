"""Policies of the exact testbed. They start at π_ref and return what a loss reads of a policy."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from var.testbed.world import World


class TabularPolicy(nn.Module, ABC):
    """π_θ over all prompts of a world, optionally with a value per prompt and prefix, which starts at 0."""

    def __init__(self, world: World, critic: bool = False) -> None:
        super().__init__()
        self.responses = world.responses
        shape = world.logits.shape[:-1]
        self.state_values = nn.Parameter(torch.zeros(shape, dtype=torch.float64)) if critic else None

    @abstractmethod
    def logits(self) -> Tensor:
        """Return [P, H, V], the logits of the next token after each prefix."""

    def forward(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return [N] nats, the log-probability of each response token of B sequences, and [N] values, if any.

        prompts and responses are [B] int. The value of a token is the critic's estimate before it.
        """
        mask = self.responses.mask[responses]
        prefix, token = (part[responses][mask] for part in self.responses.path)
        x = prompts.repeat_interleave(mask.sum(1))
        logps = self.logits().log_softmax(-1)[x, prefix, token]
        return logps, None if self.state_values is None else self.state_values[x, prefix]

    @torch.no_grad()
    def logps(self) -> Tensor:
        """Return [P, Y] nats, log π_θ of every response."""
        return self.responses.logps(self.logits())


class TablePolicy(TabularPolicy):
    """A policy whose logits are all parameters. It can reach any optimum, and prompts do not affect each other."""

    def __init__(self, world: World, critic: bool = False) -> None:
        super().__init__(world, critic)
        self.table = nn.Parameter(world.logits.clone())

    def logits(self) -> Tensor:
        """Return the table [P, H, V]."""
        return self.table
