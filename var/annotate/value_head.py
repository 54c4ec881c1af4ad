"""V(x), the reference's expected reward at a prompt, for advantages (Baheti et al., arXiv 2305.14718; their code).

One learned query attends over the frozen reference's last hidden states of the prompt; a linear map and a sigmoid
onto the reward's range follow. Fitted by squared error on the rewards of the reference's own answers to prompts that
do not train. Where we leave their code: padding is masked (they attend to it), there is no dropout (theirs stays on
while HHA's advantages are computed), the first prediction is the mean reward, the range has a lower end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ValueHead:
    """development_prompts: how many prompts are set apart to fit it, and never train. epochs, learning_rate (AdamW),
    batch (prompts): of the fit. heads: of the attention; they divide the hidden size. lowest, largest: the reward's
    range on the run's scale; predictions lie within. seed: of first weights and order.
    """

    development_prompts: int
    epochs: int
    learning_rate: float
    heads: int
    batch: int
    lowest: float
    largest: float
    seed: int

    def __post_init__(self) -> None:
        if min(self.development_prompts, self.epochs, self.heads, self.batch) < 1 or not self.learning_rate > 0:
            raise UserError("loss.value: development_prompts, epochs, heads and batch are ≥ 1, learning_rate is > 0")
        if not self.lowest < self.largest:
            raise UserError(f"loss.value.lowest={self.lowest} is not below loss.value.largest={self.largest}")

    def fit(self, states: Sequence[Tensor], rewards: Tensor) -> torch.nn.Module:
        """states: [T_i, H] of each prompt; rewards: [n], the mean over the reference's own answers to it.

        Keeps the epoch of least training error. The global generators are left as they were.
        """
        if not len(states) == len(rewards) > 0:
            raise ValueError(f"{len(states)} prompts' states beside {len(rewards)} rewards")
        if not ((self.lowest <= rewards) & (rewards <= self.largest)).all():
            raise UserError(
                f"rewards of the reference's answers run from {rewards.min():.4g} to {rewards.max():.4g}, outside "
                f"loss.value.lowest={self.lowest} to loss.value.largest={self.largest}; set these to the reward's "
                "range, or reward_scale=sigmoid with 0 and 1"
            )
        size, device = states[0].shape[1], states[0].device
        if size % self.heads:
            raise UserError(f"loss.value.heads={self.heads} does not divide the reference's hidden size {size}")
        rewards = rewards.to(device, torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed the GPUs too
            head = _Head(size, self.heads, self.lowest, self.largest, float(rewards.mean())).to(device)
            optimizer = torch.optim.AdamW(head.parameters(), lr=self.learning_rate)
            least, kept = math.inf, {}
            for _ in range(self.epochs):
                for chosen in torch.randperm(len(states)).split(self.batch):
                    optimizer.zero_grad()
                    predicted = head(*_padded([states[i] for i in chosen.tolist()]))
                    (predicted - rewards[chosen.to(device)]).square().mean().backward()
                    optimizer.step()
                error = float((self.predict(head, states).to(device) - rewards).square().mean())
                if error < least:
                    least, kept = error, {name: value.clone() for name, value in head.state_dict().items()}
        if not kept:
            raise UserError(
                "the value estimate is not a number: the reference's hidden states hold infinities or NaN, or "
                "loss.value.learning_rate is too high"
            )
        head.load_state_dict(kept)
        return head.eval().requires_grad_(False)

    @torch.no_grad()
    def predict(self, head: torch.nn.Module, states: Sequence[Tensor]) -> Tensor:
        """[T_i, H] of each prompt → [m] float32 on the CPU, in reward units; the same whatever else is asked with."""
        head.eval()
        parts = [head(*_padded([part])) for part in states]  # one by one: cheap, and the same to the last bit
        return torch.cat(parts).float().cpu() if parts else torch.zeros(0)


class _Head(torch.nn.Module):
    """Multi-head attention with one learned query, in an order that never forms keys and values of each token:
    q·(W x_t) = (Wᵀq)·x_t, and Σ_t a_t W x_t = W Σ_t a_t x_t. A key's bias would fall out of the softmax.
    """

    def __init__(self, size: int, heads: int, lowest: float, largest: float, mean: float) -> None:
        super().__init__()
        self.lowest, self.largest = lowest, largest
        self.query = torch.nn.Parameter(torch.randn(heads, size // heads))
        self.key = torch.nn.Parameter(torch.empty(heads, size // heads, size))
        self.value = torch.nn.Parameter(torch.empty(heads, size // heads, size))
        for weight in (self.key, self.value):
            torch.nn.init.uniform_(weight, -(size**-0.5), size**-0.5)
        self.out = torch.nn.Linear(size, size)
        self.last = torch.nn.Linear(size, 1)
        torch.nn.init.zeros_(self.last.weight)
        share = min(max((mean - lowest) / (largest - lowest), 0.01), 0.99)  # a sigmoid at its end would not learn
        torch.nn.init.constant_(self.last.bias, math.log(share / (1 - share)))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states: [B, T, H]; mask: [B, T], True at the prompt's tokens. Returns [B]."""
        towards = torch.einsum("hd,hds->hs", self.query, self.key) / self.query.shape[1] ** 0.5
        scores = torch.einsum("bts,hs->bht", states, towards).masked_fill(~mask[:, None], -torch.inf)
        pooled = torch.einsum("bht,bts->bhs", scores.softmax(-1), states)
        mixed = self.out(torch.einsum("bhs,hds->bhd", pooled, self.value).flatten(1))
        return self.lowest + (self.largest - self.lowest) * self.last(mixed)[:, 0].sigmoid()


def _padded(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[T_i, H] each → [B, T, H] float32, and [B, T], True where there is a token."""
    lengths = torch.tensor([len(part) for part in states], device=states[0].device)
    padded = pad_sequence([part.float() for part in states], batch_first=True)
    return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
