"""Policy: a causal language model whose forward returns the log-probabilities of a batch's response tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from var.data.chat import Chat
from var.models.attention import check_packable
from var.models.logprobs import check_head, compute_hidden_states, compute_token_logps
from var.models.packing import Packed


def open_policy(path: str, dtype: str = "float32") -> tuple["Policy", Chat]:
    """Return the policy and the chat template of a model in a folder or on the hub, for code outside a run.

    Raises:
        UserError: the model does not exist, or its log-probabilities would not be exact.
    """
    from var.models.pretrained import Pretrained

    model = Pretrained(
        name=path, path=path, revision=None, trust_remote_code=False, chat_template=None, dtype=dtype,
        attention="packed", gradient_checkpointing=False, architecture=None,
    )  # fmt: skip
    return Policy(model.load()), model.chat


class Policy(nn.Module):
    """Compute log π(y_t | x, y_<t) for each response token of a packed batch.

    The head is part of this forward too, so that FSDP's hooks see a single module.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        check_head(model)
        check_packable(model)
        self.model = model

    def forward(self, batch: Packed) -> Tensor:
        """Return [N] nats, in the order of batch.target."""
        return self.logps(self.predictor_states(batch), batch)

    def predictor_states(self, batch: Packed) -> Tensor:
        """Return [N, H]: the hidden state from which each response token is predicted."""
        return compute_hidden_states(self.model.base_model, batch)[batch.predictor]

    def logps(self, hidden: Tensor, batch: Packed) -> Tensor:
        """Return [N] nats, given the result of `predictor_states`."""
        return compute_token_logps(hidden, self.model.get_output_embeddings().weight, batch.target)

    @torch.no_grad()
    def prompt_states(self, batch: Packed) -> list[Tensor]:
        """Return the hidden states [T, H] of each packed segment, to estimate the value of a prompt."""
        hidden = compute_hidden_states(self.model.base_model, batch)
        return [hidden[s.start : s.stop] for s in batch.segments]

    def prompt_features(self, batch: Packed) -> Tensor:
        """Return [B, 2H]: the last and the mean hidden state of each packed segment."""
        return torch.stack([torch.cat([states[-1], states.mean(0)]) for states in self.prompt_states(batch)])
