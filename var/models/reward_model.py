"""RewardModel: a scalar per sequence."""

from typing import Any

import torch
from torch import Tensor, nn

from var.models.attention import check_packable
from var.models.logprobs import hidden_states
from var.models.packing import Packed


class RewardModel(nn.Module):
    """A sequence classifier with one label: forward(batch) is its raw score of each whole sequence.

    The model's backbone runs packed where it is a decoder with a `score` head; any other classifier runs through
    its own forward, one sequence at a time. Neither sees padding, so a score does not depend on its neighbours.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.packed = hasattr(model, "score") and model.config._attn_implementation == "packed"
        if self.packed:
            check_packable(model)

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
