"""A world small enough to enumerate: Z(x), π* and every divergence are sums, not estimates (docs/method.md).

A response is a word over a small alphabet, followed by the end token. A word of T letters has no end token. The words
are the nodes of a tree, numbered breadth first: the empty word is 0, and word h followed by letter a is h · A + a. The
number of a word is the number of the response that stops there, and also of the prefix that continues from there. So
one index serves the table of next-token logits, the responses and the rewards. A policy is a table [P, H, V] of
next-token logits, as a network would return them. Everything is float64 on the CPU.

Shapes: P prompts, Y responses, H prefixes, T tokens, V next tokens, A = V − 1 letters, F features of a prompt.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from var.weights.inputs import WeightInputs


@dataclass(frozen=True)
class Responses:
    """All words of up to `tokens` tokens. Token 0 is the end token, tokens 1 to A are letters."""

    letters: int
    """A, the size of the alphabet."""
    tokens: int
    """T, the most tokens of a response."""

    @cached_property
    def depth(self) -> Tensor:
        """[Y], the number of letters of each word."""
        return torch.repeat_interleave(torch.arange(self.tokens + 1), self.letters ** torch.arange(self.tokens + 1))

    @cached_property
    def prefixes(self) -> int:
        """H, the number of words that can continue. They are the first H of the Y words."""
        return int((self.depth < self.tokens).sum())

    @cached_property
    def length(self) -> Tensor:
        """[Y], the number of response tokens: the letters and the end token, or T letters."""
        return (self.depth + 1).clamp(max=self.tokens)

    @cached_property
    def mask(self) -> Tensor:
        """[Y, T] bool, whether there is a token."""
        return torch.arange(self.tokens) < self.length[:, None]

    @cached_property
    def path(self) -> tuple[Tensor, Tensor]:
        """Two tensors [Y, T] int: the prefix before each token, and the token. Both are 0 where there is no token."""
        count = len(self.depth)
        prefix, token = torch.zeros(count, self.tokens).long(), torch.zeros(count, self.tokens).long()
        ends = self.depth < self.tokens
        prefix[ends, self.depth[ends]] = torch.arange(count)[ends]  # the end token follows the word itself
        word = torch.arange(count)
        for _ in range(self.tokens):
            inner = word > 0
            parent = (word[inner] - 1) // self.letters
            position = self.depth[word[inner]] - 1
            prefix[inner, position] = parent
            token[inner, position] = word[inner] - parent * self.letters
            word = torch.where(inner, (word - 1) // self.letters, 0)
        return prefix, token

    def token_logps(self, logits: Tensor) -> Tensor:
        """Return [..., Y, T] nats of next-token logits [..., H, V], 0 where there is no token."""
        prefix, token = self.path
        return logits.log_softmax(-1)[..., prefix, token] * self.mask

    def logps(self, logits: Tensor) -> Tensor:
        """Return [..., Y] nats of next-token logits [..., H, V], summed over tokens."""
        return self.token_logps(logits).sum(-1)


@dataclass(frozen=True, kw_only=True)
class World:
    """Prompts with a reference policy and a reward for every response."""

    responses: Responses
    """The responses, the same for all prompts."""
    logits: Tensor
    """[P, H, V], next-token logits of π_ref."""
    rewards: Tensor
    """[P, Y], r(x, y) of every response under every prompt. So r(x_i, y_j) is rewards[i, y_j]."""
    features: Tensor
    """[P, F], what is known of a prompt."""

    def __len__(self) -> int:
        """Return P."""
        return len(self.rewards)

    @cached_property
    def token_logps(self) -> Tensor:
        """[P, Y, T] nats, log π_ref of each token, 0 where there is no token."""
        return self.responses.token_logps(self.logits)

    @cached_property
    def logps(self) -> Tensor:
        """[P, Y] nats, log π_ref(y|x)."""
        return self.token_logps.sum(-1)

    def log_partition(self, temperature: float) -> Tensor:
        """Return [P], log Z(x) = log Σ_y π_ref(y|x) e^{r/λ}."""
        return (self.logps + self.rewards / temperature).logsumexp(-1)

    def optimum(self, temperature: float) -> Tensor:
        """Return [P, Y] nats, log π*(y|x), the optimum of RLHF's objective."""
        return (self.logps + self.rewards / temperature).log_softmax(-1)

    def reward(self, logps: Tensor) -> float:
        """Return E_x E_{y~π}[r] of log π [P, Y]."""
        return float(expectation(logps, self.rewards).mean())

    def summary(self, logps: Tensor, temperature: float) -> dict[str, float]:
        """Return means over prompts of log π [P, Y]: divergences from π* and π_ref, reward, response length."""
        best = self.optimum(temperature)
        return {
            "kl_optimum_policy": float(kl(best, logps).mean()),
            "kl_policy_optimum": float(kl(logps, best).mean()),
            "kl_policy_reference": float(kl(logps, self.logps).mean()),
            "reward": self.reward(logps),
            "length": float(expectation(logps, self.responses.length.double()).mean()),
        }

    def sample(self, prompts: Tensor, generator: torch.Generator, logps: Tensor | None = None) -> Tensor:
        """Return one response per prompt, [...] int for prompts [...] int, from log π [P, Y] or else from π_ref."""
        cumulative = (self.logps if logps is None else logps).exp().cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:] + torch.arange(len(self))[:, None]  # row p runs from p to p + 1
        draws = prompts + torch.rand(prompts.shape, dtype=torch.float64, generator=generator)
        found = torch.searchsorted(cumulative.reshape(-1), draws, right=True) - prompts * cumulative.shape[1]
        return found.clamp(0, cumulative.shape[1] - 1)

    def weight_inputs(self, prompts: Tensor, responses: Tensor, micro: Tensor | None = None) -> WeightInputs:
        """Return the numbers of rows (x, y), [n] int each, that the estimators of VAR's weight read.

        The group of a row is the rank of its prompt among the distinct prompts. In-batch estimators also need `micro`,
        [M, B] int, the rows of each micro-batch.
        """
        present, group = prompts.unique(return_inverse=True)
        cross = None if micro is None else (prompts[micro][..., :, None], responses[micro][..., None, :])
        return WeightInputs(
            rewards=self.rewards[prompts, responses],
            group=group,
            length=self.responses.length[responses],
            reference_logps=self.logps[prompts, responses],
            features=self.features[present],
            micro=micro,
            cross_rewards=None if cross is None else self.rewards[cross],
            cross_logps=None if cross is None else self.logps[cross],
        )


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return [P], KL(p ‖ q) in nats of two log-probabilities [P, Y]. A response of probability 0 under p adds 0."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def expectation(logps: Tensor, values: Tensor) -> Tensor:
    """Return [P], Σ_y e^{logps} values, for logps [P, Y] and values [P, Y] or [Y]."""
    return (logps.exp() * values).sum(-1)
