"""RewardModel: a sequence classifier whose forward returns a score per sequence."""

from typing import Any

import torch
from torch import Tensor, nn

from var.models.attention import VARLEN, check_packable
from var.models.logprobs import compute_hidden_states
from var.models.packing import Packed


class RewardModel(nn.Module):
    """Compute a raw score per sequence, by a classifier with one label.

    A decoder with a `score` head runs packed. Any other classifier runs its own forward on one sequence at a time.
    Neither sees padding, so a score does not depend on the other sequences of its batch.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.packed = hasattr(model, "score") and model.config._attn_implementation in ("packed", *VARLEN)
        if self.packed:
            check_packable(model)

    def forward(self, batch: Packed) -> Tensor:
        """Return [B] raw logits in float32 or better. The batch is made by `whole`."""
        if self.packed:
            hidden = compute_hidden_states(self.model.base_model, batch)
            last = hidden[find_last_tokens(batch, self.model.config.pad_token_id)]
            weight, bias = self.model.score.weight, self.model.score.bias
            precise = torch.promote_types(last.dtype, torch.float32)
            bias = None if bias is None else bias.to(precise)
            score = nn.functional.linear(last.to(precise), weight.to(precise), bias)
        else:
            rows = [batch.input_ids[s.start : s.stop][None] for s in batch.segments]
            score = torch.cat([self.model(input_ids=row).logits for row in rows]).float()
        return score[:, 0]


def find_last_tokens(batch: Packed, pad: int | None) -> Tensor:
    """Return [B] positions: each sequence's last token that is not `pad`, by transformers' rule.

    If pad is the end token, that is the token before it. The head was trained to be read there. Of a sequence of `pad`
    alone it is the first token.
    """
    first = batch.position_ids == 0
    kept = first if pad is None else first | (batch.input_ids != pad)
    at = torch.arange(len(kept), device=kept.device)
    last = at.new_zeros(len(batch))
    return last.scatter_reduce(0, first.cumsum(0) - 1, at if pad is None else torch.where(kept, at, 0), "amax")
