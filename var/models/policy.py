"""Policy (log-probabilities of responses) and RewardModel (a scalar a sequence): modules whose forward takes Packed.

Beside them a policy with a value head, and one with its adapter off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from var.models.attention import check_packable
from var.models.logprobs import check_head, hidden_states, token_logps
from var.models.packing import Packed
from var.utils.errors import UserError


class Policy(nn.Module):
    """A causal language model as the objectives see it: forward(batch) is log π(y_t | x, y_<t) for each response token.

    All of it happens in this forward, head included, so that FSDP's hooks see one module.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        check_head(model.config)
        check_packable(model)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise UserError(f"{model.config.model_type} has a bias in its head, which the engine does not apply")
        self.model = model

    def forward(self, batch: Packed) -> Tensor:
        """Returns [N] nats, in the order of batch.target."""
        return self.logps(self.predicting(batch), batch)

    def predicting(self, batch: Packed) -> Tensor:
        """[N, H]: the hidden state before each response token."""
        return hidden_states(self.model.base_model, batch)[batch.predictor]

    def logps(self, hidden: Tensor, batch: Packed) -> Tensor:
        """[N] nats, of what `predicting` returned."""
        return token_logps(hidden, self.model.get_output_embeddings().weight, batch.target)

    @torch.no_grad()
    def prompt_states(self, batch: Packed) -> list[Tensor]:
        """[T, H] of each packed segment: its hidden states, for a value estimate of the prompt."""
        hidden = hidden_states(self.model.base_model, batch)
        return [hidden[s.start : s.stop] for s in batch.segments]

    def prompt_features(self, batch: Packed) -> Tensor:
        """[B, 2H]: the last and the mean hidden state of each packed segment."""
        return torch.stack([torch.cat([states[-1], states.mean(0)]) for states in self.prompt_states(batch)])


@contextmanager
def gather_parameters(module: nn.Module) -> Iterator[None]:
    """Within, a part of a module can be called past its forward, by each rank as often as it likes (sampling does):
    FSDP's parameters are gathered, all of them, and stay so; the whole model has room on each device.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module._get_fsdp_state()._lazy_init()  # before the first forward nothing has said which module is the root
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    module.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)  # as fully_shard leaves them
            part.reshard()
