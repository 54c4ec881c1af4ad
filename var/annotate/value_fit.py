"""V(x), the reference's expected reward for a prompt (Baheti et al., arXiv 2305.14718; their code).

One learned query attends over the frozen reference's last hidden states of the prompt. A linear map and a sigmoid onto
the reward's range follow. The head is fitted by squared error on the rewards of the reference's own responses to
prompts that are not trained on. It differs from their code in four points: padding is masked (they attend to it), there
is no dropout (theirs is on while HHA's advantages are computed), the initial prediction is the mean reward, and the
range has a lower end.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from var.requirements import ValueFit
from var.utils.errors import UserError


def fit_value_head(settings: ValueFit, states: Sequence[Tensor], rewards: Tensor) -> torch.nn.Module:
    """Return a fitted head: the epoch of least training error. The global random generators are not changed.

    Args:
        settings: of the fit.
        states: [T_i, H] for each of n prompts.
        rewards: [n], the mean reward of the reference's own responses to each prompt.
    """
    if not len(states) == len(rewards) > 0:
        raise ValueError(f"got states of {len(states)} prompts and {len(rewards)} rewards")
    if not ((settings.lowest <= rewards) & (rewards <= settings.largest)).all():
        raise UserError(
            f"rewards of the reference's responses range from {rewards.min():.4g} to {rewards.max():.4g}, outside "
            f"loss.value.lowest={settings.lowest} to loss.value.largest={settings.largest}. Set these to the reward's "
            "range, or use reward_scale=sigmoid with 0 and 1."
        )
    size, device = states[0].shape[1], states[0].device
    if size % settings.heads:
        raise UserError(f"loss.value.heads={settings.heads} does not divide the reference's hidden size {size}")
    rewards = rewards.to(device, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # torch.manual_seed would seed the GPUs too
        head = _Head(size, settings, float(rewards.mean())).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate)
        least, best = math.inf, {}
        for _ in range(settings.epochs):
            for chosen in torch.randperm(len(states)).split(settings.batch):
                optimizer.zero_grad()
                predicted = head(*_pad([states[i] for i in chosen.tolist()]))
                (predicted - rewards[chosen.to(device)]).square().mean().backward()
                optimizer.step()
            error = float((predict_values(head, states).to(device) - rewards).square().mean())
            if error < least:
                least, best = error, {name: value.clone() for name, value in head.state_dict().items()}
    if not best:
        raise UserError(
            "the value estimate is NaN: the reference's hidden states hold infinities or NaN, or "
            "loss.value.learning_rate is too high"
        )
    head.load_state_dict(best)
    return head.eval().requires_grad_(False)


@torch.no_grad()
def predict_values(head: torch.nn.Module, states: Sequence[Tensor]) -> Tensor:
    """Return [m] float32 on the CPU, in units of the reward, for states [T_i, H] of m prompts.

    Prompts are processed one at a time, so a value does not depend on the other prompts, to the last bit.
    """
    head.eval()
    parts = [head(*_pad([part])) for part in states]
    return torch.cat(parts).float().cpu() if parts else torch.zeros(0)


class _Head(torch.nn.Module):
    """Multi-head attention with one learned query, ordered so that no token's key or value is formed.

    q·(W x_t) = (Wᵀq)·x_t, and Σ_t a_t W x_t = W Σ_t a_t x_t. A bias of the key would cancel in the softmax.
    """

    def __init__(self, size: int, settings: ValueFit, mean: float) -> None:
        super().__init__()
        heads = settings.heads
        self.lowest, self.largest = settings.lowest, settings.largest
        self.query = torch.nn.Parameter(torch.randn(heads, size // heads))
        self.key = torch.nn.Parameter(torch.empty(heads, size // heads, size))
        self.value = torch.nn.Parameter(torch.empty(heads, size // heads, size))
        for weight in (self.key, self.value):
            torch.nn.init.uniform_(weight, -(size**-0.5), size**-0.5)
        self.out = torch.nn.Linear(size, size)
        self.last = torch.nn.Linear(size, 1)
        torch.nn.init.zeros_(self.last.weight)
        initial = (mean - self.lowest) / (self.largest - self.lowest)
        initial = min(max(initial, 0.01), 0.99)  # a saturated sigmoid would not learn
        torch.nn.init.constant_(self.last.bias, math.log(initial / (1 - initial)))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return [B] values of states [B, T, H]; mask [B, T] is True at the prompt's tokens."""
        towards = torch.einsum("hd,hds->hs", self.query, self.key) / self.query.shape[1] ** 0.5
        scores = torch.einsum("bts,hs->bht", states, towards).masked_fill(~mask[:, None], -torch.inf)
        pooled = torch.einsum("bht,bts->bhs", scores.softmax(-1), states)
        mixed = self.out(torch.einsum("bhs,hds->bhd", pooled, self.value).flatten(1))
        return self.lowest + (self.largest - self.lowest) * self.last(mixed)[:, 0].sigmoid()


def _pad(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return [B, T, H] float32 and its mask [B, T] of states [T_i, H]."""
    lengths = torch.tensor([len(part) for part in states], device=states[0].device)
    padded = pad_sequence([part.float() for part in states], batch_first=True)
    return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
