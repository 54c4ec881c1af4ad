"""Policy (log-probabilities of responses) and Scorer (a scalar a sequence): modules whose forward takes Packed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from var.logprobs import hidden_states, refuse_inexact_head, refuse_leaks, token_logps
from var.packing import Packed
from var.problems import UserError


class Policy(nn.Module):
    """A causal language model as the objectives see it: forward(batch) is log π(y_t | x, y_<t) for each response token.

    All of it happens in this forward, head included, so that FSDP's hooks see one module.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        refuse_inexact_head(model.config)
        refuse_leaks(model)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise UserError(f"{model.config.model_type} has a bias in its head, which the engine does not apply")
        self.model = model

    def forward(self, batch: Packed) -> Tensor:
        """Returns [N] nats, in the order of batch.target."""
        hidden = hidden_states(self.model.base_model, batch)[batch.predictor]
        return token_logps(hidden, self.model.get_output_embeddings().weight, batch.target)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the model can be called past this forward (sampling does): FSDP's own parameters are gathered."""
        if not isinstance(self, FSDPModule):
            yield
            return
        self.unshard()
        try:
            yield
        finally:
            self.reshard()

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
            last = hidden[_ends(batch, self.model.config.pad_token_id)]
            head = self.model.score
            precise = torch.promote_types(last.dtype, torch.float32)
            score = nn.functional.linear(last.to(precise), head.weight.to(precise), _as(head.bias, precise))
        else:
            rows = [batch.input_ids[s.start : s.stop][None] for s in batch.segments]
            score = torch.cat([self.model(input_ids=row).logits for row in rows]).float()
        return score[:, 0]


def _ends(batch: Packed, pad: int | None) -> list[int]:
    """[B] where each sequence is read: its last token that is not `pad`, by transformers' rule.

    Where pad is the end token, that is the token before it; the head was trained to be read there.
    """
    tokens = batch.input_ids.tolist()
    return [max((t for t in range(s.start, s.stop) if tokens[t] != pad), default=s.start) for s in batch.segments]


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
