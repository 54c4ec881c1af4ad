"""VAR's weight exp(r/λ) / Z(x) of a response, by how Z(x) is estimated. `InBatch` also contains log π_ref.

An estimator is a frozen dataclass. Its call maps the data set's numbers (`WeightInputs`) and λ to log-weights in
float64; -inf means that a sequence is skipped. `inputs` names the fields that it reads besides the rewards.
`needs_plan` says whether a weight depends on the micro-batch, so that micro-batches must be fixed first. No estimator
sees θ or holds a gradient.

`compute_weights` makes the mean weight 1 over the training responses. Then w ≡ 1 is SFT, and learning rate, clipping
and loss curves mean the same for every estimator, B and λ. In-batch weights of a live reference are scaled otherwise
(`var/annotate/weights.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from var.requirements import Weights
from var.utils.errors import UserError
from var.weights.groups import group_log_softmax, group_logsumexp, group_size, within_prompt_std, zero_variance
from var.weights.inputs import WeightInputs
from var.weights.prompt_values import prompt_values

# Relative to the size of rewards, a smaller standard deviation is rounding error: 2e-10, a million float64 roundings.
# Rewards that differ in float32 differ by more.
ROUNDING = 2**20 * torch.finfo(torch.float64).eps

AT_ONCE = 2**16  # micro-batches whose weights are computed at once, which bounds memory


def compute_weights(requirement: Weights, inputs: WeightInputs, uniform: Tensor | None = None) -> Tensor:
    """Return [n] float64 weights of mean 1 over the training responses, and 0 for the others.

    uniform: [n] draws from [0, 1) for Russian roulette, if `requirement.roulette` is set.
    """
    estimator = requirement.estimator
    log_weights = normalize_log_weights(estimator(inputs, scale_temperature(requirement, inputs)))
    weights = log_weights.exp()
    if requirement.roulette:
        assert uniform is not None
        return normalize_log_weights(play_roulette(weights, requirement.min_weight, uniform).log()).exp()
    # Below the minimum, or so small that exp rounds it to 0.
    small = (weights < requirement.min_weight) | ((weights == 0) & (log_weights > -torch.inf))
    if small.any() and not estimator.needs_plan:  # micro-batches that are already fixed keep all their responses
        weights = normalize_log_weights(weights.masked_fill(small, 0.0).log()).exp()
    return weights


def play_roulette(weights: Tensor, least: float, uniform: Tensor) -> Tensor:
    """Return weights [n] with the same expectation, each of which is 0 or at least `least`.

    A weight w < least becomes `least` with probability w/least, and else 0. Among all such independent choices that
    keep as many in expectation, this has the smallest sum of variances (threshold sampling: Duffield, Lund and Thorup,
    "Learn more, sample less", IEEE Transactions on Information Theory, 2005).

    Args:
        weights: [n], not negative.
        least: the smallest weight that is worth a sequence's cost.
        uniform: [n] draws from [0, 1).
    """
    raised = torch.where(uniform * least < weights, least, 0.0).to(weights)
    return torch.where(weights < least, raised, weights)


def weigh(
    estimator: "Estimator",
    rewards: Tensor | Sequence[float],
    group: Tensor | Sequence[int],
    temperature: float,
    *,
    temperature_unit: Literal["reward", "sd"] = "reward",
    length: Tensor | None = None,
    **inputs: Tensor,
) -> Tensor:
    """Return the weights [n] of any rewards: float64, of mean 1, and 0 for responses that are skipped.

    Args:
        estimator: how Z(x) is estimated, such as Grouped(drop_zero_variance=True).
        rewards: [n] in reward units: a tensor, an array or a list.
        group: [n] int, equal for responses to the same prompt.
        temperature: λ > 0.
        temperature_unit: of λ: `reward`, or `sd` for the standard deviation of the reward within a prompt.
        length: [n] response tokens, for estimators that divide by them.
        inputs: further fields of `var.weights.inputs.WeightInputs`, if `estimator.inputs` names them. Those of prompts
            are in the order of the sorted numbers of `group`.

    Raises:
        UserError: a setting is out of range, rewards and group differ in length, a reward is not finite, or the
            standard deviation is 0 or absent.
        ValueError: the estimator reads an input that is not given.
    """
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}")
    rewards, group = torch.as_tensor(rewards, dtype=torch.float64), torch.as_tensor(group)
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise UserError(
            f"rewards and group must have one number per response, got shapes {[*rewards.shape]} and {[*group.shape]}"
        )
    if not rewards.isfinite().all():
        raise UserError(f"reward {int((~rewards.isfinite()).nonzero()[0])} is NaN or infinite")
    columns = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    index = group.unique(return_inverse=True)[1]
    asked = Weights(estimator=estimator, temperature=temperature, temperature_unit=temperature_unit, min_weight=0.0)
    tokens = torch.ones_like(index) if length is None else length
    if length is None and getattr(estimator, "reduction", None) == "mean":
        raise ValueError("InBatch with reduction=mean divides by response tokens: pass `length`")
    return compute_weights(asked, WeightInputs(rewards=rewards, group=index, length=tokens, **columns))


def scale_temperature(requirement: Weights, inputs: WeightInputs) -> float:
    """Return λ in units of the reward. Raise UserError if its unit, a standard deviation, is absent, 0 or noise."""
    if requirement.temperature_unit == "reward":
        return requirement.temperature
    sigma = within_prompt_std(inputs.rewards, inputs.group)
    if not sigma and (group_size(inputs.group) == 1).all():
        raise UserError(
            "loss.temperature_unit=sd: each prompt has one response, so the standard deviation within a prompt is "
            "undefined. For single responses use loss=var_prompt loss.temperature_unit=reward. Otherwise give several "
            "responses per prompt, or sample them with data.responses=sampled."
        )
    if not sigma:
        raise UserError(
            "loss.temperature_unit=sd: the rewards of each prompt's responses are all equal, so their standard "
            "deviation is 0. Use several different responses per prompt (data.responses=both or all, "
            "generate.responses), other prompts or another reward, or set loss.temperature_unit=reward."
        )
    varying = inputs.rewards[~zero_variance(inputs.rewards, inputs.group)]
    size = float(varying.square().mean().sqrt())
    if sigma < ROUNDING * size:
        raise UserError(
            f"loss.temperature_unit=sd: the standard deviation of the rewards within a prompt is {sigma:.3g}, which is "
            f"rounding error for rewards of size {size:.3g}. Use other prompts or another reward, or set "
            "loss.temperature_unit=reward."
        )
    return requirement.temperature * sigma


def normalize_log_weights(log_weights: Tensor) -> Tensor:
    """Return log-weights [n] whose weights have mean 1 over the training sequences."""
    return log_weights - log_mean(log_weights)


def log_mean(log_weights: Tensor) -> Tensor:
    """Return the log of the mean weight over the training sequences, or 0 if there is none."""
    kept = log_weights[log_weights > -torch.inf]
    return kept.logsumexp(0) - np.log(len(kept)) if len(kept) else log_weights.new_zeros(())


def in_batch_log_weights(rewards: Tensor, logps: Tensor) -> Tensor:
    """Return the log of the diagonal of the row-wise softmax of s_ij + r_ij/λ (arXiv 2502.11026, Eq. 9 and 10).

    Args:
        rewards: [..., B, B], already divided by λ. Row i is a prompt, column j a response.
        logps: [..., B, B] nats, s_ij: summed or averaged over response tokens, or zero. -inf for an absent column.

    Returns:
        [..., B] log-weights ≤ 0.
    """
    return (logps + rewards).log_softmax(-1).diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True, kw_only=True)
class InBatch:
    """Z(x) over the micro-batch: the paper's Eq. 9 and 10."""

    reduction: Literal["mean", "sum", "none"] = "mean"
    """How log π_ref(y_j|x_i) is reduced over response tokens. With `sum` the shortest response takes the
    micro-batch whatever its reward (docs/method.md). `mean` averages over tokens, so that length does not decide.
    `none` omits π_ref.
    """
    reference: Literal["cross", "own"] = "cross"
    """`cross` for log π_ref(y_j|x_i), `own` for log π_ref(y_j|x_j), which the paper's times fit."""

    reference_in_numerator: bool = True
    """Whether the numerator is π_ref(y_i|x_i) e^{r/λ}, as in a softmax, or e^{r/λ} alone, as Eq. 10 is printed. Then
    the weight is unbounded: the less probable a response is under π_ref, the larger.
    """

    needs_plan: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum", "none") or self.reference not in ("cross", "own"):
            raise UserError("loss.estimator: reduction must be mean, sum or none, and reference cross or own")
        if self.reduction == "none" and self.reference == "own":
            raise UserError("loss.estimator.reference=own has no effect with reduction=none, which omits π_ref")
        if self.reduction == "none" and not self.reference_in_numerator:
            raise UserError("loss.estimator.reference_in_numerator has no effect with reduction=none: π_ref is omitted")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The fields of WeightInputs that it reads."""
        if self.reduction == "none":
            return ("cross_rewards",)
        return ("cross_rewards", {"cross": "cross_logps", "own": "reference_logps"}[self.reference])

    @property
    def is_bounded(self) -> bool:
        """Whether the weights are finite before they are divided by their mean: a softmax, or a mean over tokens."""
        return self.reference_in_numerator or self.reduction != "sum"

    def __call__(self, inputs: WeightInputs, temperature: float) -> Tensor:
        """Return [n] log-weights; -inf for a sequence that is in no micro-batch."""
        micro, sequences = inputs.get("micro"), len(inputs.rewards)
        log_weights = inputs.rewards.new_full((sequences + 1,), -torch.inf)  # absent ones write to the last entry
        for begin in range(0, len(micro), AT_ONCE):
            some = slice(begin, begin + AT_ONCE)
            place = torch.where(micro[some] >= 0, micro[some], sequences)
            diagonal = self._log_weights(inputs, some, temperature)
            log_weights.scatter_(0, place.flatten(), diagonal.flatten())
        return log_weights[:sequences]

    def _log_weights(self, inputs: WeightInputs, some: slice, temperature: float) -> Tensor:
        """Return the log-weights [m, B] of some micro-batches."""
        micro, rewards = inputs.get("micro")[some], inputs.get("cross_rewards")[some]  # [m, B] and [m, B, B]
        present, micro = micro >= 0, micro.clamp(min=0)
        logps = torch.zeros_like(rewards)
        if self.reduction != "none":
            if self.reference == "cross":
                logps = inputs.get("cross_logps")[some]
            else:
                logps = inputs.get("reference_logps")[micro][:, None, :].expand_as(rewards)
            if self.reduction == "mean":
                logps = logps / inputs.length[micro][:, None, :]
        rewards = torch.where(present[:, None, :], rewards, 0.0)
        logps = torch.where(present[:, None, :], logps, -torch.inf)
        log_weights = in_batch_log_weights(rewards / temperature, logps)
        return log_weights if self.reference_in_numerator else log_weights - logps.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """K · softmax of r/λ over the prompt's own K responses. A pair gives 2σ(Δr/λ)."""

    drop_zero_variance: bool
    """Whether to skip groups whose rewards are all equal. Otherwise each of their weights is 1, which is a step of
    SFT regardless of the rewards. A group of one response also has zero variance.
    """

    needs_plan: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, inputs: WeightInputs, temperature: float) -> Tensor:
        """Return [n] log-weights."""
        log_weights = group_log_softmax(inputs.rewards / temperature, inputs.group) + group_size(inputs.group).log()
        if self.drop_zero_variance:
            log_weights = log_weights.masked_fill(zero_variance(inputs.rewards, inputs.group), -torch.inf)
        return log_weights


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """(K + κ) e^{r/λ} / (Σ_k e^{r_k/λ} + κ e^{(V(x)+c)/λ}): a group with κ pseudo-responses of the expected reward.

    c makes the mean weight of the data set 1. No weight exceeds K + κ. This estimator is ours.
    """

    kappa: float = 4.0
    """κ > 0. As κ → 0 it tends to `Grouped`, and as κ → ∞ to `Value` without its cap."""
    baseline: Literal["ridge", "zero"] = "ridge"
    """V(x): `ridge` for a cross-fitted regression on the reference's hidden states of the prompt, or `zero`."""
    drop_zero_variance: bool = False
    """Whether to skip groups whose rewards are all equal."""

    needs_plan: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.kappa > 0:
            raise UserError(f"loss.estimator.kappa must be above 0, got {self.kappa}. For κ = 0 use loss=var_grouped.")
        if self.baseline not in ("ridge", "zero"):
            raise UserError(f"loss.estimator.baseline must be ridge or zero, got {self.baseline}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The fields of WeightInputs that it reads."""
        return ("features",) if self.baseline == "ridge" else ()

    def __call__(self, inputs: WeightInputs, temperature: float) -> Tensor:
        """Return [n] log-weights."""
        kept = torch.ones_like(inputs.rewards, dtype=torch.bool)
        if self.drop_zero_variance:
            kept = ~zero_variance(inputs.rewards, inputs.group)
        logits = inputs.rewards / temperature
        values = prompt_values(inputs)[inputs.group] if self.baseline == "ridge" else torch.zeros_like(logits)
        size, own = group_size(inputs.group), group_logsumexp(logits, inputs.group)
        kappa = torch.tensor(self.kappa, dtype=logits.dtype)

        def shifted(shift: float) -> Tensor:
            pseudo = kappa.log() + values / temperature + shift
            return (size + kappa).log() + logits - torch.logaddexp(own, pseudo)

        log_weights = shifted(_find_mean_one(lambda shift: shifted(shift)[kept]))
        return log_weights.masked_fill(~kept, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class Value:
    """exp((r − V(x))/λ), capped: advantage-weighted regression (Peng et al., 2019).

    V(x) is a cross-fitted ridge regression on the reference's hidden states of the prompt.
    """

    cap: float = 5.0
    """The largest weight over the mean weight, above 1. Capping lowers the mean and weights are then normalized again,
    so the largest weight ends above the cap.
    """

    needs_plan: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("features",)

    def __post_init__(self) -> None:
        if not self.cap > 1:
            raise UserError(f"loss.estimator.cap must be above 1, since the mean weight is 1; got {self.cap}")

    def __call__(self, inputs: WeightInputs, temperature: float) -> Tensor:
        """Return [n] log-weights."""
        advantage = (inputs.rewards - prompt_values(inputs)[inputs.group]) / temperature
        return normalize_log_weights(advantage).clamp(max=float(np.log(self.cap)))


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """e^{r/λ} / ((1/K) Σ_k e^{r_k/λ}) over K responses that the reference sampled: the paper's 8∗ (its Table 7)."""

    candidates: int = 8
    """K."""
    seed: int = 1000
    """The seed of the candidates. It must differ from the data's, or a sampled response would be in its own Z(x)."""
    cap: float | None = 5.0
    """The largest weight over the mean weight, as in `Value`; None for no cap."""

    needs_plan: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("candidates",)

    def __post_init__(self) -> None:
        if self.candidates < 1 or not (self.cap is None or self.cap > 1):
            raise UserError("loss.estimator: candidates must be at least 1, and cap above 1 or null")

    def __call__(self, inputs: WeightInputs, temperature: float) -> Tensor:
        """Return [n] log-weights."""
        log_partition = (inputs.get("candidates") / temperature).logsumexp(1) - float(np.log(self.candidates))
        log_weights = inputs.rewards / temperature - log_partition[inputs.group]
        if self.cap is None:
            return log_weights
        return normalize_log_weights(log_weights).clamp(max=float(np.log(self.cap)))


@dataclass(frozen=True, kw_only=True)
class Global:
    """exp(r/λ) over its mean on the data set: reward-weighted regression. The control: easy prompts dominate."""

    needs_plan: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, inputs: WeightInputs, temperature: float) -> Tensor:
        """Return [n] log-weights."""
        return inputs.rewards / temperature


Estimator = InBatch | Grouped | Prompt | Value | Sampled | Global


def _find_mean_one(log_weights: Callable[[float], Tensor]) -> float:
    """Return the shift at which weights that decrease with it have mean 1, by bisection."""
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
