"""Policy (log-probabilities of responses) and Scorer (a scalar a sequence): modules whose forward takes Packed.

Beside them a policy with a value head, and one with its adapter off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from var.adapters import adapter_off
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


class ActorCritic(nn.Module):
    """A policy and a value head on its hidden states, for PPO: forward(batch) is both, one value a response token."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.head = nn.Linear(policy.model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def model(self) -> Any:
        return self.policy.model

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Returns [N] nats and [N] reward units, the value of the state before each response token."""
        hidden = self.policy.predicting(batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.head(hidden.to(self.head.weight.dtype))[:, 0]
        return self.policy.logps(hidden, batch), values


def without_values(policy: Policy | ActorCritic) -> Policy:
    """What gives the log-probabilities alone."""
    return policy.policy if isinstance(policy, ActorCritic) else policy


class WithoutAdapter:
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
            return without_values(self.policy).prompt_states(batch)

    def prompt_features(self, batch: Packed) -> Tensor:
        """As a Policy's."""
        with adapter_off(self.model):
            return without_values(self.policy).prompt_features(batch)

    def to(self, device: torch.device | str) -> "WithoutAdapter":
        """Moves the policy: it is the same model."""
        if next(self.policy.parameters()).device != torch.device(device):
            self.policy.to(device)
        return self


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
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


class Scorer(nn.Module):
    """A sequence classifier with one label: forward(batch) is its raw score of each whole sequence.

    The model's backbone runs packed where it is a decoder with a `score` head; any other classifier runs through
    its own forward, one sequence at a time. Neither sees padding, so a score does not depend on its neighbours.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.packed = hasattr(model, "score") and model.config._attn_implementation == "packed"
        if self.packed:
            refuse_leaks(model)

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
