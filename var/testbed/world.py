"""A world small enough to enumerate: Z(x), π* and every divergence are sums, not estimates (docs/method.md).

A response is a word over a few letters, then the end token; a word of T letters is cut there, without an end. Words
are the nodes of a tree, numbered breadth first: the empty word is 0 and word h goes on with letter a as h · A + a. The
number of a word is also the number of the response that stops at it, and of the prefix that goes on from it, so one
index serves π_ref's table of next tokens, responses and rewards. Everything is float64 on the CPU.

The policy is a table [P, H, V] of next-token logits, as a network's output would be; a network, shared parameters or
another table of that shape gives log-probabilities by the same functions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from var.weights.table import Table

Record = dict[str, Any]


@dataclass(frozen=True)
class Responses:
    """All words of up to `tokens` tokens over `letters` letters. V = letters + 1, token 0 is the end.

    Y responses, H prefixes that go on (the first H of the Y words), T = tokens.
    """

    letters: int
    tokens: int

    @cached_property
    def depth(self) -> Tensor:
        """[Y] letters of each word."""
        return torch.repeat_interleave(torch.arange(self.tokens + 1), self.letters ** torch.arange(self.tokens + 1))

    @cached_property
    def prefixes(self) -> int:
        """H: words that are not cut yet."""
        return int((self.depth < self.tokens).sum())

    @cached_property
    def length(self) -> Tensor:
        """[Y] response tokens: the letters and the end, or T letters."""
        return (self.depth + 1).clamp(max=self.tokens)

    @cached_property
    def mask(self) -> Tensor:
        """[Y, T] bool: there is a token."""
        return torch.arange(self.tokens) < self.length[:, None]

    @cached_property
    def path(self) -> tuple[Tensor, Tensor]:
        """prefix, token [Y, T] int: what stands before each token, and the token. 0 where there is none."""
        count = len(self.depth)
        prefix, token = torch.zeros(count, self.tokens).long(), torch.zeros(count, self.tokens).long()
        ends = self.depth < self.tokens
        prefix[ends, self.depth[ends]] = torch.arange(count)[ends]  # the end token follows the word itself
        word = torch.arange(count)
        for _ in range(self.tokens):
            inner = word > 0
            parent = (word[inner] - 1) // self.letters
            place = self.depth[word[inner]] - 1
            prefix[inner, place] = parent
            token[inner, place] = word[inner] - parent * self.letters
            word = torch.where(inner, (word - 1) // self.letters, 0)
        return prefix, token

    def token_logps(self, logits: Tensor) -> Tensor:
        """Next-token logits [..., H, V] → [..., Y, T] nats, 0 where there is no token."""
        prefix, token = self.path
        return logits.log_softmax(-1)[..., prefix, token] * self.mask

    def logps(self, logits: Tensor) -> Tensor:
        """Next-token logits [..., H, V] → [..., Y] nats, summed over tokens; e^ of it sums to 1 over Y."""
        return self.token_logps(logits).sum(-1)


@dataclass(frozen=True, kw_only=True)
class World:
    """P prompts, Y responses. logits [P, H, V]: π_ref's. rewards [P, Y]: r(x, y) of every response under every prompt,
    so r(x_i, y_j) is rewards[i, y_j]. features [P, F]: what is known of a prompt.
    """

    responses: Responses
    logits: Tensor
    rewards: Tensor
    features: Tensor

    def __len__(self) -> int:
        """P."""
        return len(self.rewards)

    @cached_property
    def token_logps(self) -> Tensor:
        """[P, Y, T] nats: log π_ref of each token; 0 where `responses.mask` has none."""
        return self.responses.token_logps(self.logits)

    @cached_property
    def logps(self) -> Tensor:
        """[P, Y] nats: log π_ref(y|x)."""
        return self.token_logps.sum(-1)

    def log_partition(self, temperature: float) -> Tensor:
        """[P]: log Z(x) = log Σ_y π_ref(y|x) e^{r/λ}."""
        return (self.logps + self.rewards / temperature).logsumexp(-1)

    def optimum(self, temperature: float) -> Tensor:
        """[P, Y] nats: log π*(y|x), RLHF's optimum."""
        return (self.logps + self.rewards / temperature).log_softmax(-1)

    def reward(self, logps: Tensor) -> float:
        """E_x E_{y~π}[r], of log π [P, Y]."""
        return float(expectation(logps, self.rewards).mean())

    def objective(self, logps: Tensor, temperature: float) -> float:
        """RLHF's: E[r] − λ KL(π ‖ π_ref). Its maximum is E_x[λ log Z(x)], at π*."""
        return self.reward(logps) - temperature * float(kl(logps, self.logps).mean())

    def summary(self, logps: Tensor, temperature: float) -> Record:
        """Of log π [P, Y], means over prompts: both divergences from π*, KL(π ‖ π_ref), E[r], mean response length."""
        best = self.optimum(temperature)
        return {
            "kl_optimum_policy": float(kl(best, logps).mean()),
            "kl_policy_optimum": float(kl(logps, best).mean()),
            "kl_policy_reference": float(kl(logps, self.logps).mean()),
            "reward": self.reward(logps),
            "length": float(expectation(logps, self.responses.length.double()).mean()),
        }

    def frontier(self, temperatures: Iterable[float]) -> list[Record]:
        """The most reward at each KL(π ‖ π_ref): π* over λ. No policy lies above it."""
        return [{"temperature": t, **self.summary(self.optimum(t), t)} for t in temperatures]

    def within_deviation(self) -> float:
        """σ: the reward's standard deviation under π_ref, pooled over prompts."""
        mean = expectation(self.logps, self.rewards)
        return float(expectation(self.logps, (self.rewards - mean[:, None]).square()).mean().sqrt())

    def between_deviation(self) -> float:
        """Standard deviation over prompts of E_{π_ref}[r]."""
        return float(expectation(self.logps, self.rewards).std(unbiased=False))

    def overlap(self) -> float:
        """Σ_y min(π_ref(y|x_i), π_ref(y|x_j)), averaged over pairs of different prompts."""
        return mean_overlap(self.logps)

    def sample(self, prompts: Tensor, generator: torch.Generator, logps: Tensor | None = None) -> Tensor:
        """One response to each of `prompts` [...] int, from π_ref or from the policy `logps` [P, Y]. [...] int."""
        cumulative = (self.logps if logps is None else logps).exp().cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:] + torch.arange(len(self))[:, None]  # row p runs from p to p + 1
        draws = prompts + torch.rand(prompts.shape, dtype=torch.float64, generator=generator)
        found = torch.searchsorted(cumulative.reshape(-1), draws, right=True) - prompts * cumulative.shape[1]
        return found.clamp(0, cumulative.shape[1] - 1)

    def micro_batches(self, number: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """prompts, responses [M, B] int: prompts uniformly with replacement, y_j ~ π_ref(·|x_j)."""
        prompts = torch.randint(len(self), (number, size), generator=generator)
        return prompts, self.sample(prompts, generator)

    def table(self, prompts: Tensor, responses: Tensor, micro: Tensor | None = None) -> Table:
        """The numbers of n rows (x, y) [n], [n] as the estimators read them; a row's group is its prompt among those
        present, in order. micro [M, B] int: rows of each micro-batch, for in-batch estimators."""
        present, group = prompts.unique(return_inverse=True)
        cross = None if micro is None else (prompts[micro][..., :, None], responses[micro][..., None, :])
        return Table(
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
    """[P, Y] log-probabilities, twice → [P]: KL(p ‖ q) in nats. A response that p never gives costs nothing."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def expectation(logps: Tensor, values: Tensor) -> Tensor:
    """[P]: Σ_y e^{logps} values, values [P, Y] or [Y]."""
    return (logps.exp() * values).sum(-1)


def mean_overlap(logps: Tensor) -> float:
    """[P, Y] log-probabilities: Σ_y min(p_i, p_j), averaged over pairs of different rows."""
    p = logps.exp()
    count = len(p)
    total = sum(float(torch.minimum(p[i], p[i + 1 :]).sum()) for i in range(count - 1))
    return total / (count * (count - 1) / 2)


def foreign(logps: Tensor) -> Tensor:
    """[P, Y] log π_ref → [P, Y] in [0, 1]: 1 − π_ref(y|x) / mean_x' π_ref(y|x'), and 0 where that is below 0: how far
    an answer is another prompt's."""
    typical = logps.logsumexp(0) - torch.tensor(len(logps)).log()
    return 1 - (logps - typical).exp().clamp(max=1)


def draw(
    seed: int,
    *,
    prompts: int = 40,
    letters: int = 3,
    tokens: int = 5,
    overlap: float = 0.72,
    spread: float = 1.0,
    offset: float = 1.0,
    mismatch: float = 0.0,
    features: int = 8,
) -> World:
    """A world by its seed.

    overlap: of two prompts' π_ref (World.overlap; of the first 128), met by how far prompts' logits lie apart, less so
    in later tokens, or prompts would part by having one answer each. spread, offset: the reward's standard deviation
    within a prompt under π_ref, pooled, and between prompts, both before the mismatch. mismatch: how much less another
    prompt's answer scores, at most (`foreign` is its share). Half of the rewards' variance is the response's own, half
    is what its prompt makes of it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    space = Responses(letters, tokens)
    x = normal(prompts, features)
    shared = normal(space.prefixes, letters + 1)
    own = (x @ normal(features, space.prefixes * (letters + 1)) / features**0.5).reshape(prompts, *shared.shape)
    own = own * 0.6 ** space.depth[: space.prefixes, None]
    scale = _scale_for(lambda s: mean_overlap(space.logps(shared + s * own[:128])), overlap)
    logits = shared + scale * own
    logps = space.logps(logits)

    count = len(space.depth)
    quality = normal(count) + x @ normal(features, count) / features**0.5
    quality = quality - expectation(logps, quality)[:, None]
    quality = spread * quality / expectation(logps, quality.square()).mean().sqrt()
    offsets = x @ normal(features) / features**0.5 + normal(prompts)
    offsets = offset * (offsets - offsets.mean()) / offsets.std(unbiased=False)
    rewards = offsets[:, None] + quality - mismatch * foreign(logps)
    return World(responses=space, logits=logits, features=x, rewards=rewards)


def shared_world(seed: int = 0, **options: Any) -> World:
    """Prompts that overlap: answers answer each other's prompts."""
    return draw(seed, **{"overlap": 0.72, "tokens": 5, **options})


def apart_world(seed: int = 0, **options: Any) -> World:
    """Prompts with answers of their own; another prompt's answer scores up to 4 lower."""
    return draw(seed, **{"overlap": 0.08, "tokens": 5, "letters": 4, "mismatch": 4.0, **options})


def long_world(seed: int = 0, **options: Any) -> World:
    """The same with longer answers."""
    return draw(seed, **{"overlap": 0.14, "tokens": 7, "mismatch": 4.0, **options})


WORLDS = {"shared": shared_world, "apart": apart_world, "long": long_world}


def _scale_for(overlap_at: Any, target: float) -> float:
    """The scale at which a decreasing overlap meets the target, by bisection."""
    low, high = 0.0, 1.0
    while overlap_at(high) > target:
        low, high = high, 2 * high
        if high > 64:  # beyond it a prompt has one answer
            raise ValueError(f"prompts of this draw overlap by more than {target}; give more letters or tokens")
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap_at(middle) > target else (low, middle)
    return (low + high) / 2
