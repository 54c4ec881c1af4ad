"""Policy (log-probabilities of responses) and Scorer (a scalar a sequence): modules whose forward takes Packed."""

from typing import Any

import torch
from torch import Tensor, nn

from var.logprobs import hidden_states, refuse_inexact_head, token_logps
from var.packing import Packed


class Policy(nn.Module):
    """A causal language model as the objectives see it: forward(batch) is log π(y_t | x, y_<t) for each response token.

    All of it happens in this forward, head included, so that FSDP's hooks see one module.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        refuse_inexact_head(model.config)
        self.model = model

    def forward(self, batch: Packed) -> Tensor:
        """Returns [N] nats, in the order of batch.target."""
        hidden = hidden_states(self.model.base_model, batch)[batch.predictor]
        return token_logps(hidden, self.model.get_output_embeddings().weight, batch.target)

    @torch.no_grad()
    def prompt_features(self, batch: Packed) -> Tensor:
        """[B, 2H]: the last and the mean hidden state of each packed segment, for a value estimate of the prompt."""
        hidden = hidden_states(self.model.base_model, batch)
        return torch.stack([torch.cat([hidden[s.stop - 1], hidden[s.start : s.stop].mean(0)]) for s in batch.segments])


class Scorer(nn.Module):
    """A sequence classifier with one label: forward(batch) is its raw score of each whole sequence.

    The model's backbone runs packed where it is a decoder with a `score` head; any other classifier runs through
    its own forward, one sequence at a time. Neither sees padding, so a score does not depend on its neighbours.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.packed = hasattr(model, "score") and model.config._attn_implementation == "packed"

    def forward(self, batch: Packed) -> Tensor:
        """Returns [B], raw logits in fp32 or better. The batch's segments are whole sequences."""
        if self.packed:
            hidden = hidden_states(self.model.base_model, batch)
            last = hidden[[s.stop - 1 for s in batch.segments]]
            head = self.model.score
            precise = torch.promote_types(last.dtype, torch.float32)
            score = nn.functional.linear(last.to(precise), head.weight.to(precise), _as(head.bias, precise))
        else:
            rows = [batch.input_ids[s.start : s.stop][None] for s in batch.segments]
            score = torch.cat([self.model(input_ids=row).logits for row in rows]).float()
        return score[:, 0]


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
