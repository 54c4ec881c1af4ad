"""The weight of a response, exp(r/λ) / Z(x), by how Z is estimated, in log space, float64.

Each estimator is a frozen dataclass: `needs`, and a call from the data set's numbers to log-weights. Nothing here
holds a gradient or sees θ. `normalise` divides by the data set's mean weight, once, so that w ≡ 1 is SFT and learning
rate, clipping and loss curves mean the same for every estimator, B and λ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from var.requirements import Need
from var.utils.errors import UserError
from var.weights.groups import group_log_softmax, group_logsumexp, group_size, zero_variance
from var.weights.prompt_values import prompt_values
from var.weights.table import Table


def in_batch_log_weights(rewards: Tensor, logps: Tensor) -> Tensor:
    """Log of the diagonal of the row-wise softmax of s_ij + r_ij/λ (arXiv 2502.11026, Eq. 9, 10).

    rewards, logps: [..., B, B], row i a prompt, column j a response; rewards already divided by λ, logps in nats:
    s_ij summed, averaged over response tokens, or zero. A missing column is -inf in logps. Returns [..., B] ≤ 0.
    """
    return (logps + rewards).log_softmax(-1).diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True, kw_only=True)
class InBatch:
    """Z over the micro-batch: the paper's Eq. 9, 10.

    reduction: of log π_ref(y_j|x_i) over response tokens. `sum` is the literal reading, and there the shortest
    answer takes the micro-batch whatever its reward (docs/method.md); `mean` is the paper's method made usable;
    `none` leaves π_ref out. reference: `cross` for log π_ref(y_j|x_i), `own` for log π_ref(y_j|x_j), one pass over
    the own pairs, which the paper's times fit.
    """

    reduction: Literal["mean", "sum", "none"] = "mean"
    reference: Literal["cross", "own"] = "cross"

    planned = True  # the weight depends on the micro-batch, so the plan comes first

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum", "none") or self.reference not in ("cross", "own"):
            raise UserError("loss.estimator: reduction is mean, sum or none; reference is cross or own")
        if self.reduction == "none" and self.reference == "own":
            raise UserError("loss.estimator.reference=own does nothing beside reduction=none, which leaves π_ref out")

    @property
    def needs(self) -> frozenset[Need]:
        logps = {"cross": Need.CROSS_LOGPS, "own": Need.REFERENCE_LOGPS}[self.reference]
        return frozenset({Need.REWARDS, Need.CROSS_REWARDS} | (set() if self.reduction == "none" else {logps}))

    def __call__(self, table: Table, temperature: float) -> Tensor:
        """Returns [n] log-weights; -inf for a sequence that is in no micro-batch."""
        assert table.micro is not None
        assert table.cross_rewards is not None
        present = table.micro >= 0
        micro = table.micro.clamp(min=0)
        logps = torch.zeros_like(table.cross_rewards)
        if self.reduction != "none":
            if self.reference == "cross":
                assert table.cross_logps is not None
                logps = table.cross_logps
            else:
                assert table.reference_logps is not None
                logps = table.reference_logps[micro][:, None, :].expand_as(table.cross_rewards)
            if self.reduction == "mean":
                logps = logps / table.length[micro][:, None, :]
        rewards = torch.where(present[:, None, :], table.cross_rewards, 0.0)
        logps = torch.where(present[:, None, :], logps, -torch.inf)
        diagonal = in_batch_log_weights(rewards / temperature, logps)
        out = torch.full_like(table.rewards, -torch.inf)
        out[micro[present]] = diagonal[present]
        return out


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """K · softmax of r/λ over the prompt's own K responses. A pair gives 2σ(Δr/λ).

    drop_zero_variance: leave out groups whose rewards are all equal, a group of one among them: each of their
    weights is 1 whatever the answers are worth, an SFT step on them. They are counted.
    """

    drop_zero_variance: bool = False

    planned = False

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS})

    def __call__(self, table: Table, temperature: float) -> Tensor:
        log_weights = group_log_softmax(table.rewards / temperature, table.group) + group_size(table.group).log()
        if self.drop_zero_variance:
            log_weights = log_weights.masked_fill(zero_variance(table), -torch.inf)
        return log_weights


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """(K + κ) e^{r/λ} / (Σ_k e^{r_k/λ} + κ e^{(V(x)+c)/λ}): a group with κ pseudo-responses of the usual reward.

    kappa: κ > 0; towards 0 it is `grouped`, towards ∞ `value`. baseline: V, `ridge` cross-fitted on the reference's
    hidden states of the prompt, or `zero`. c makes the mean weight of the data set 1. Bounded by K + κ. Ours.
    """

    kappa: float = 4.0
    baseline: Literal["ridge", "zero"] = "ridge"
    drop_zero_variance: bool = False

    planned = False

    def __post_init__(self) -> None:
        if not self.kappa > 0:
            raise UserError(f"loss.estimator.kappa is κ > 0, got {self.kappa}; κ = 0 is loss=var_grouped")
        if self.baseline not in ("ridge", "zero"):
            raise UserError("loss.estimator.baseline is ridge or zero")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS} | ({Need.PROMPT_FEATURES} if self.baseline == "ridge" else set()))

    def __call__(self, table: Table, temperature: float) -> Tensor:
        kept = ~zero_variance(table) if self.drop_zero_variance else torch.ones_like(table.rewards, dtype=torch.bool)
        logits = table.rewards / temperature
        values = prompt_values(table)[table.group] if self.baseline == "ridge" else torch.zeros_like(logits)
        size, own = group_size(table.group), group_logsumexp(logits, table.group)
        kappa = torch.tensor(self.kappa, dtype=logits.dtype)

        def log_weights(shift: float) -> Tensor:
            usual = kappa.log() + values / temperature + shift
            return (size + kappa).log() + logits - torch.logaddexp(own, usual)

        out = log_weights(_mean_one(lambda shift: log_weights(shift)[kept]))
        return out.masked_fill(~kept, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class Value:
    """exp((r − V(x))/λ), capped at `cap` times its mean, then divided by its mean again: advantage-weighted regression
    (Peng et al., 2019).

    V: ridge regression on the reference's hidden states of the prompt, cross-fitted by prompt. cap: > 1; what it cuts
    off lowers the mean, so the largest weight comes out above it.
    """

    cap: float = 5.0

    planned = False

    def __post_init__(self) -> None:
        if not self.cap > 1:
            raise UserError(f"loss.estimator.cap bounds weights of mean 1, so it is above 1; got {self.cap}")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS, Need.PROMPT_FEATURES})

    def __call__(self, table: Table, temperature: float) -> Tensor:
        advantage = (table.rewards - prompt_values(table)[table.group]) / temperature
        return normalize_log_weights(advantage).clamp(max=float(np.log(self.cap)))


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """e^{r/λ} / ((1/K) Σ_k e^{r_k/λ}) over K responses that the reference sampled: the paper's 8∗ (its Table 7).

    candidates: K. seed: theirs, another than the data's, lest an answer be in its own normaliser where the data was
    sampled too. cap: as Value's; null for none.
    """

    candidates: int = 8
    seed: int = 1
    cap: float | None = 5.0

    planned = False

    def __post_init__(self) -> None:
        if self.candidates < 1 or not (self.cap is None or self.cap > 1):
            raise UserError("loss.estimator: candidates is at least 1, cap above 1 or null")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS, Need.CANDIDATE_REWARDS})

    def __call__(self, table: Table, temperature: float) -> Tensor:
        assert table.candidates is not None
        log_partition = (table.candidates / temperature).logsumexp(1) - float(np.log(self.candidates))
        out = table.rewards / temperature - log_partition[table.group]
        return out if self.cap is None else normalize_log_weights(out).clamp(max=float(np.log(self.cap)))


@dataclass(frozen=True, kw_only=True)
class Global:
    """exp(r/λ) over its mean on the data set: reward-weighted regression; the control, drowned by prompt offsets."""

    planned = False

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS})

    def __call__(self, table: Table, temperature: float) -> Tensor:
        return table.rewards / temperature


Estimator = InBatch | Grouped | Prompt | Value | Sampled | Global


def normalize_log_weights(log_weights: Tensor) -> Tensor:
    """[n] → [n]: log-weights whose weights have mean 1 over those that are not left out (-inf)."""
    return log_weights - log_mean(log_weights)


def log_mean(log_weights: Tensor) -> Tensor:
    """Log of the mean weight over those that are not left out; 0 where all are."""
    kept = log_weights[log_weights > -torch.inf]
    return kept.logsumexp(0) - np.log(len(kept)) if len(kept) else log_weights.new_zeros(())


def _mean_one(log_weights: Callable[[float], Tensor]) -> float:
    """The shift at which decreasing weights have mean 1, by bisection."""
    low, high = -1.0, 1.0
    while float(log_weights(low).exp().mean()) < 1 and low > -1e15:
        low *= 2
    while float(log_weights(high).exp().mean()) > 1 and high < 1e15:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if float(log_weights(middle).exp().mean()) > 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2
