"""Estimators of Z(x): each closed form by hand in float64, then what docs/method.md says of them."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from var.weights.table import Table

from var.losses.var import VAR
from var.requirements import Need
from var.utils.errors import UserError
from var.weights.estimators import (
    Estimator,
    Global,
    Grouped,
    InBatch,
    Prompt,
    Sampled,
    Value,
    in_batch_log_weights,
    normalize_log_weights,
)
from var.weights.groups import within_prompt_std
from var.weights.health import health
from var.weights.prompt_values import prompt_values


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table(rewards: Tensor, group: list[int] | None = None, length: list[int] | None = None, **extra: Tensor) -> Table:
    n = len(rewards)
    return Table(
        rewards=rewards,
        group=torch.tensor(group) if group is not None else torch.arange(n),
        length=torch.tensor(length or [1] * n),
        **extra,
    )


def weights(estimator: Estimator, data: Table, temperature: float = 1.0) -> Tensor:
    return estimator(data, temperature).exp()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


# --- the micro-batch

PAIR = dict(
    rewards=f64(1.0, 2.0),
    length=[2, 3],
    reference_logps=f64(-2.0, -6.0),
    micro=torch.tensor([[0, 1]]),
    cross_rewards=torch.tensor([[[1.0, 0.0], [0.5, 2.0]]], dtype=torch.float64),
    cross_logps=torch.tensor([[[-2.0, -6.0], [-4.0, -6.0]]], dtype=torch.float64),
)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (InBatch(reduction="mean"), (0.9525741268224334, 0.9525741268224334)),
        (InBatch(reduction="sum"), (0.9975273768433653, 0.7310585786300049)),
        (InBatch(reduction="none"), (0.8807970779778823, 0.9525741268224334)),
        (InBatch(reduction="mean", reference="own"), (0.9525741268224334, 0.8807970779778823)),
        (InBatch(reduction="sum", reference="own"), (0.9975273768433653, 0.2689414213699951)),
    ],
)
def test_in_batch_of_two_is_a_sigmoid_of_the_rows_difference(estimator, expected):
    """B = 2: w_i = σ(s_ii + r_ii/λ − s_ij − r_ij/λ). λ = 1/2, so r/λ = [[2, 0], [1, 4]].

    mean: s = log π_ref(y_j|x_i) / length_j = [[−1, −2], [−2, −2]]: σ(1 + 2), σ(2 − (−1)).
    sum: [[−2, −6], [−4, −6]]: σ(0 − (−6)), σ(−2 − (−3)). none: σ(2), σ(3).
    own: s_ij = s_jj. mean [−1, −2]: σ(1 − (−2)), σ(2 − 0). sum [−2, −6]: σ(0 − (−6)), σ(−2 − (−1)).
    """
    assert_close(weights(estimator, table(**PAIR), 0.5), f64(*expected), rtol=1e-14, atol=0)


def test_in_batch_weights_follow_the_plan_and_a_short_micro_batch():
    """micro [[2, 0], [1, −1]]: sequence 1 is alone, so its weight is 1; 2 and 0: σ(1 − 0), σ(3 − 1); 3 is in none.

    What stands in the absent cells is no number of ours, NaN as well.
    """
    nan = math.nan
    data = table(
        f64(3.0, 5.0, 1.0, 7.0),
        length=[1, 1, 1, 1],
        micro=torch.tensor([[2, 0], [1, -1]]),
        cross_rewards=torch.tensor([[[1.0, 0.0], [1.0, 3.0]], [[5.0, nan], [nan, nan]]], dtype=torch.float64),
        cross_logps=torch.zeros(2, 2, 2, dtype=torch.float64),
    )
    for reduction in ("none", "mean", "sum"):
        found = weights(InBatch(reduction=reduction), data)
        assert_close(found, f64(0.8807970779778823, 1.0, 0.7310585786300049, 0.0), rtol=1e-14, atol=0)
    assert_close(normalize_log_weights(found.log()).exp()[:3].mean(), f64(1.0)[0])
    assert normalize_log_weights(found.log())[3] == -torch.inf


def test_an_in_batch_weight_lies_between_0_and_1_and_its_rows_sum_to_1():
    torch.manual_seed(0)
    logps, rewards = -50 * torch.rand(6, 8, 8).double(), 20 * torch.randn(6, 8, 8).double()
    found = in_batch_log_weights(rewards, logps).exp()
    assert found.shape == (6, 8)
    assert bool(((found >= 0) & (found <= 1)).all())
    columns = [in_batch_log_weights(rewards.roll(-k, -1), logps.roll(-k, -1)) for k in range(8)]
    shifted = torch.stack([c.exp()[:, 0] for c in columns])  # row 0's whole softmax, one column after the other
    assert_close(shifted.sum(0), torch.ones(6).double())


def test_in_batch_weights_do_not_see_what_a_prompt_adds_to_all_rewards():
    offset = torch.tensor([[[7.0], [-3.0]]], dtype=torch.float64)
    moved = table(**{**PAIR, "cross_rewards": PAIR["cross_rewards"] + offset})
    assert_close(weights(InBatch(), moved), weights(InBatch(), table(**PAIR)))


def test_needs_follow_from_the_fields():
    """`none` reads no reference; `own` reads the own pairs alone."""
    assert InBatch().needs == {Need.REWARDS, Need.CROSS_REWARDS, Need.CROSS_LOGPS}
    assert InBatch(reference="own").needs == {Need.REWARDS, Need.CROSS_REWARDS, Need.REFERENCE_LOGPS}
    assert InBatch(reduction="none").needs == {Need.REWARDS, Need.CROSS_REWARDS}
    assert Prompt().needs == Value().needs == {Need.REWARDS, Need.PROMPT_FEATURES}
    assert Prompt(baseline="zero").needs == Grouped().needs == Global().needs == {Need.REWARDS}
    assert [e.planned for e in (InBatch(), Grouped(), Prompt(), Value(), Global())] == [True, *[False] * 4]


# --- the group


def test_a_pair_is_weighted_by_twice_the_sigmoid():
    """K = 2: w = 2σ(Δr/λ). Δr = 1, λ = 1/2: 2σ(2) = 1.7615942, and the other 2 − that. The rows need not be side by
    side; a group of one has weight 1."""
    found = weights(Grouped(), table(f64(1.0, 9.0, 0.0), group=[1, 0, 1]), 0.5)
    assert_close(found, f64(1.7615941559557646, 1.0, 0.2384058440442354), rtol=1e-14, atol=0)


def test_a_group_of_three():
    """K = 3, e^{r/λ} = 1, 2, 5: w = 3/8, 6/8, 15/8."""
    data = table(2 * f64(1, 2, 5).log(), group=[0, 0, 0])
    assert_close(weights(Grouped(), data, 2.0), f64(0.375, 0.75, 1.875), rtol=1e-14, atol=0)


def test_grouped_weights_do_not_see_what_a_prompt_adds_to_all_rewards():
    torch.manual_seed(0)
    group = torch.arange(5).repeat_interleave(4)
    rewards, offset = torch.randn(20).double(), 30 * torch.randn(5).double()
    plain, moved = (table(r, group=group.tolist()) for r in (rewards, rewards + offset[group]))
    assert_close(weights(Grouped(), moved, 0.5), weights(Grouped(), plain, 0.5))
    assert not torch.allclose(weights(Global(), moved, 0.5), weights(Global(), plain, 0.5))


@pytest.mark.parametrize(
    "estimator", [Grouped(drop_zero_variance=True), Prompt(baseline="zero", drop_zero_variance=True)]
)
def test_groups_of_equal_rewards_are_left_out_and_only_those(estimator):
    """Left out: two equal answers, and a group of one. Kept: a difference of 1e-9, which is a difference."""
    data = table(f64(1, 1, 1, 0, 3, 0, 1e-9), group=[0, 0, 1, 1, 2, 3, 3])
    found = estimator(data, 1.0)
    assert (found == -torch.inf).tolist() == [True, True, False, False, True, False, False]
    assert_close(normalize_log_weights(found).exp().sum(), f64(4.0)[0])
    assert bool((Grouped()(data, 1.0) > -torch.inf).all())


def test_a_data_set_without_any_signal_keeps_no_weight():
    for estimator in (Grouped(drop_zero_variance=True), Prompt(baseline="zero", drop_zero_variance=True)):
        assert VAR(estimator=estimator).weights(table(f64(1, 1, 2, 2), group=[0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


# --- the group with pseudo-responses


def test_prompt_with_one_response_each():
    """K = 1: w = (1 + κ) u / (u + κ e^c), u = e^{r/λ}, V = 0. κ = 4, u = 2 and 2/7: 10/6 and (10/7)/(30/7) sum to 2,
    so c = 0 and w = 5/3, 1/3. A constant added to all rewards goes into c."""
    for constant in (0.0, 6.0, -900.0):
        data = table(0.5 * f64(2, 2 / 7).log() + constant)
        assert_close(weights(Prompt(kappa=4, baseline="zero"), data, 0.5), f64(5 / 3, 1 / 3), rtol=1e-9, atol=0)


def test_prompt_with_pairs():
    """K = κ = 2: w = 4u / (Σu + 2e^c). u = 9/2, 3/2 and 1/2, 1/6: 4u/8 and 4u/(8/3) have mean 1 at c = 0."""
    data = table(f64(4.5, 1.5, 0.5, 1 / 6).log(), group=[0, 0, 1, 1])
    assert_close(weights(Prompt(kappa=2, baseline="zero"), data), f64(2.25, 0.75, 0.75, 0.25), rtol=1e-9, atol=0)


def test_prompts_constant_is_of_the_rows_that_are_kept():
    """The pairs above beside one without signal, whose reward would move c: w as above, and nothing for it."""
    data = table(torch.cat([f64(4.5, 1.5, 0.5, 1 / 6).log(), f64(5, 5)]), group=[0, 0, 1, 1, 2, 2])
    found = weights(Prompt(kappa=2, baseline="zero", drop_zero_variance=True), data)
    assert_close(found, f64(2.25, 0.75, 0.75, 0.25, 0, 0), rtol=1e-9, atol=0)


def test_prompt_subtracts_the_value_of_the_prompt():
    """Two prompts: V is the other one's reward, so (r − V)/λ = ±Δr/λ; κ = 1: w = 2σ(±2) at Δr = 1, λ = 1/2.
    With V = 0 it is r/λ less its mean: 2σ(±1)."""
    data = table(f64(1.0, 0.0), features=torch.zeros(2, 3))
    ridge, zero = (weights(Prompt(kappa=1, baseline=b), data, 0.5) for b in ("ridge", "zero"))
    assert_close(ridge, f64(1.7615941559557646, 0.2384058440442354), rtol=1e-9, atol=0)
    assert_close(zero, f64(1.4621171572600098, 0.5378828427399902), rtol=1e-9, atol=0)


def spread(seed: int = 0) -> Table:
    """40 prompts of 1 to 4 responses, rewards with offsets of the prompt and a heavy tail."""
    torch.manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(40), torch.randint(1, 5, (40,)))
    rewards = torch.randn(len(group)).double() ** 3 + 2 * torch.randn(40).double()[group]
    return table(rewards, group=group.tolist(), features=torch.randn(40, 6))


@pytest.mark.parametrize("kappa", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("baseline", ["ridge", "zero"])
def test_prompt_has_mean_1_and_stays_below_its_bound(kappa, baseline):
    """c makes the bounded weights average 1; w ≤ K + κ, and a large reward comes near that."""
    data = spread()
    found = weights(Prompt(kappa=kappa, baseline=baseline), data, 0.3)
    bound = torch.bincount(data.group)[data.group].double() + kappa
    assert_close(found.mean(), f64(1.0)[0], rtol=1e-9, atol=0)
    assert bool((found <= bound * (1 + 1e-12)).all())
    assert float((found / bound).max()) > 0.8


def test_prompt_tends_to_grouped_and_to_the_uncapped_value():
    """κ → 0 is K softmax; κ → ∞ is exp((r − V)/λ) over its mean."""
    data = spread()
    assert_close(weights(Prompt(kappa=1e-9), data), weights(Grouped(), data), rtol=1e-6, atol=1e-6)
    value = normalize_log_weights((data.rewards - prompt_values(data)[data.group]) / 1.0).exp()
    assert_close(weights(Prompt(kappa=1e12), data), value, rtol=1e-4, atol=1e-9)


# --- value, global, normalise


def test_value_is_capped_in_units_of_the_mean():
    """r − V = ±1, λ = 1/2: e^{±2} over their mean: 2σ(±4) = 1.9640276, 0.0359724. cap = 3/2 takes the first."""
    data = table(f64(1.0, 0.0), features=torch.zeros(2, 1))
    assert_close(weights(Value(), data, 0.5), f64(1.9640275800758169, 0.0359724199241831))
    assert_close(weights(Value(cap=1.5), data, 0.5), f64(1.5, 0.0359724199241831))
    assert_close(VAR(estimator=Value(cap=1.5), temperature=0.5).weights(data).mean(), f64(1.0)[0])
    # what is cut off lowers the mean, and division by it lifts the largest above the cap again
    assert_close(VAR(estimator=Value(cap=1.5), temperature=0.5).weights(data)[:1], f64(3 / 1.5359724199241831))


def sampled() -> Table:
    """e^{r/λ} of the rows 2, 6, 9, of prompts 1, 0, 1; of the candidates 4, 8 of prompt 0 and 1, 3 of 1. λ = 1/2."""
    candidates = torch.tensor([[4.0, 8.0], [1.0, 3.0]], dtype=torch.float64).log() / 2
    return table(f64(2.0, 6.0, 9.0).log() / 2, group=[1, 0, 1], candidates=candidates)


def test_sampled_divides_by_the_mean_over_its_own_candidates():
    """Z = 6 and 2: weights 2/2, 6/6, 9/2, whose mean is 13/6. Capped at 2 they are 6/13, 6/13 and 2."""
    estimator = Sampled(candidates=2, cap=None)
    assert_close(weights(estimator, sampled(), 0.5), f64(1.0, 1.0, 4.5), rtol=1e-14, atol=0)
    assert_close(weights(Sampled(candidates=2), sampled(), 0.5), f64(6 / 13, 6 / 13, 27 / 13), rtol=1e-14, atol=0)
    assert_close(weights(Sampled(candidates=2, cap=2.0), sampled(), 0.5), f64(6 / 13, 6 / 13, 2), rtol=1e-14, atol=0)
    assert_close(VAR(estimator=estimator, temperature=0.5).weights(sampled()).mean(), f64(1.0)[0])


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_sampled_takes_the_candidates_in_log_space(scale: float):
    """Rewards of ±10⁵ at λ = 0.01: e^{r/λ} overflows, its log does not."""
    data = table(f64(-1.0, 1.0) * scale, candidates=f64(-1.0, 1.0)[:, None] * scale)
    assert_close(weights(Sampled(candidates=1, cap=None), data, 0.01), f64(1.0, 1.0))


def test_sampled_needs_rewards_of_candidates_and_refuses_wrong_settings():
    assert Sampled().needs == {Need.REWARDS, Need.CANDIDATE_REWARDS}
    assert not Sampled().planned
    for bad in ({"candidates": 0}, {"cap": 1.0}, {"cap": float("nan")}):
        with pytest.raises(UserError, match=r"^loss\.estimator: candidates is at least 1, cap above 1 or null$"):
            Sampled(**bad)


def test_global_is_the_exponential_over_its_mean():
    """e^{r/λ} = 1, 2, 9: mean 4."""
    data = table(3 * f64(1, 2, 9).log())
    assert_close(VAR(estimator=Global(), temperature=3.0).weights(data), f64(0.25, 0.5, 2.25), rtol=1e-14, atol=0)


def test_normalise_takes_the_mean_over_what_is_kept():
    """1, 3 and one left out: mean 2, not 4/3. Nothing kept stays nothing."""
    assert_close(normalize_log_weights(f64(1, 3, 0).log()).exp(), f64(0.5, 1.5, 0))
    assert normalize_log_weights(f64(-math.inf, -math.inf)).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("scale", [1e4, 1e7])
def test_huge_rewards_and_a_small_temperature_stay_finite(scale):
    """Log space: r/λ up to ±1e9 neither overflows nor gives 0/0, and the weights have mean 1."""
    torch.manual_seed(0)
    rewards = torch.cat([torch.tensor([scale, -scale]), scale * torch.randn(14)]).double()
    cross = rewards.view(2, 1, 8).repeat(1, 8, 1)
    data = table(
        rewards, group=[i // 2 for i in range(16)], features=torch.zeros(8, 1), micro=torch.arange(16).view(2, 8),
        cross_rewards=cross, cross_logps=-1e4 * torch.rand(2, 8, 8).double(), reference_logps=-rewards.abs(),
    )  # fmt: skip
    for estimator in (
        InBatch(), InBatch(reduction="sum"), InBatch(reference="own"), Grouped(), Prompt(), Prompt(baseline="zero"),
        Value(), Global(),
    ):  # fmt: skip
        found = VAR(estimator=estimator, temperature=0.01).weights(data)
        assert bool(found.isfinite().all()), estimator
        kept = found if estimator.planned else found[found > 0]  # no row trains whose weight vanishes
        assert_close(kept.mean(), f64(1.0)[0], rtol=1e-6, atol=0)


def test_kappa_holds_however_far_rewards_are_from_zero():
    """c follows the rewards: w = 5/3, 1/3 as above, at r/λ near ±1e8."""
    for far in (1e8, -1e8):
        data = table(f64(2, 2 / 7).log() + far)
        assert_close(weights(Prompt(kappa=4, baseline="zero"), data), f64(5 / 3, 1 / 3), rtol=1e-6, atol=0)


def test_wrong_settings_say_what_is_allowed():
    in_batch = "loss.estimator: reduction is mean, sum or none; reference is cross or own"
    cases = [
        (lambda: InBatch(reduction="max"), in_batch),
        (lambda: InBatch(reference="both"), in_batch),
        (
            lambda: InBatch(reduction="none", reference="own"),
            "loss.estimator.reference=own does nothing beside reduction=none, which leaves π_ref out",
        ),
        (lambda: Prompt(kappa=0), "loss.estimator.kappa is κ > 0, got 0; κ = 0 is loss=var_grouped"),
        (lambda: Prompt(kappa=math.nan), "loss.estimator.kappa is κ > 0, got nan; κ = 0 is loss=var_grouped"),
        (lambda: Prompt(baseline="mean"), "loss.estimator.baseline is ridge or zero"),
        (lambda: Value(cap=1), "loss.estimator.cap bounds weights of mean 1, so it is above 1; got 1"),
    ]
    for make, text in cases:
        with pytest.raises(UserError) as error:
            make()
        assert str(error.value) == text


# --- V(x)


def test_few_prompts_take_the_mean_of_the_others():
    """Rewards 1, 3 | 5 | 9: prompt means 2, 5, 9, so V = 7, 5.5, 3.5. A prompt without a sequence: the mean, 16/3."""
    data = table(f64(1, 3, 5, 9), group=[0, 0, 1, 2], features=torch.zeros(4, 2))
    assert_close(prompt_values(data), f64(7, 5.5, 3.5, 16 / 3))
    assert prompt_values(table(f64(4.0), features=torch.zeros(1, 2))).tolist() == [0.0]


def test_a_planted_signal_is_found_on_held_out_prompts():
    """Mean reward = 2x₀ + noise of 1/2: R² of V is near 4/4.25; the signal itself correlates by 0.97."""
    torch.manual_seed(0)
    features = torch.randn(200, 12)
    group = torch.arange(200).repeat_interleave(2)
    rewards = 5 + 2 * features[group, 0].double() + 0.5 * torch.randn(200).double()[group]
    rewards = rewards + torch.tensor([3.0, -3.0]).double().repeat(200)  # within the prompt: not V's to explain
    values = prompt_values(table(rewards, group=group.tolist(), features=features))
    own = rewards.view(-1, 2).mean(1)
    assert float(1 - (own - values).square().mean() / own.var()) > 0.9


def test_a_value_does_not_see_its_own_prompts_rewards():
    """Cross-fitting, exactly: moving one prompt's reward moves others' values, never its own."""
    torch.manual_seed(1)
    features, rewards = torch.randn(60, 5), torch.randn(60).double()
    before = prompt_values(table(rewards, features=features))
    for prompt in (0, 31, 59):
        after = prompt_values(table(rewards + 50 * (torch.arange(60) == prompt), features=features))
        assert after[prompt] == before[prompt]
        assert int((after != before).sum()) >= 50


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_features_do_not_eat_the_weight(seed):
    """Fitted on the row itself, 50 features would explain half of 100 rewards; cross-fitted they explain nothing: the
    correlation with the own reward is not positive beyond chance, and r − V keeps the spread of r."""
    torch.manual_seed(seed)
    rewards = torch.randn(100).double()
    values = prompt_values(table(rewards, features=torch.randn(100, 50)))
    assert float(torch.corrcoef(torch.stack([rewards, values]))[0, 1]) < 0.1
    assert float((rewards - values).std() / rewards.std()) > 0.95


def test_more_features_than_prompts_and_a_constant_one():
    torch.manual_seed(0)
    features = torch.cat([torch.randn(30, 100), torch.ones(30, 1)], 1)
    assert bool(prompt_values(table(torch.randn(30).double(), features=features)).isfinite().all())


# --- σ and health


def test_deviation_within_prompts_is_pooled_and_unbiased():
    """0, 2 and 1, 1, 4 (and one alone): squares 2 + 6 over 1 + 2 degrees of freedom: √(8/3)."""
    group = torch.tensor([0, 1, 0, 1, 1, 2])
    assert within_prompt_std(f64(0, 1, 2, 1, 4, 77), group) == pytest.approx(1.632993161855452, rel=1e-14)
    assert within_prompt_std(f64(0, 1), torch.tensor([0, 1])) is None


def test_health_by_hand():
    """w = 1, 1, 2, 0, lengths 1 to 4: (Σw)²/Σw²/n = 16/24; largest 2; a quarter under 1e-3; correlation −1/√10."""
    found = health(f64(1, 1, 2, 0), torch.tensor([1, 2, 3, 4]))
    assert found == pytest.approx((2 / 3, 2.0, 0.25, -0.31622776601683794))
    scaled = health(f64(8, 8, 16, 0.0079), torch.tensor([1, 2, 3, 4]))  # relative to the mean, whatever the scale
    assert scaled == pytest.approx(found, abs=1e-3)
    assert health(f64(1, 1), torch.tensor([3, 9])) == (1.0, 1.0, 0.0, 0.0)


# --- log π_ref, summed and averaged


def micro_batches(gap: float) -> Table:
    """32 micro-batches of 8 answers of 3 to 155 tokens at about 1.8 nats each, rewards of unit spread; an answer loses
    `gap` under another prompt and some log-probability per token."""
    torch.manual_seed(0)
    length = torch.randint(3, 156, (256,))
    rewards = torch.randn(256).double()
    micro = torch.arange(256).view(32, 8)
    others = 1 - torch.eye(8).double()
    per_token = -(1.8 + 0.4 * torch.randn(256).double()[micro][:, None, :] + 0.3 * others)
    return table(
        rewards, length=length.tolist(), micro=micro, cross_rewards=rewards[micro][:, None, :] - gap * others,
        cross_logps=per_token * length[micro][:, None, :],
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [0.0, 2.0, 5.0])
def test_summed_reference_logps_let_the_shortest_answer_take_the_micro_batch(temperature, gap):
    """Fact 1: whatever λ and the gap, `sum` ranks by length, not by reward, and two rows of eight train."""
    data = micro_batches(gap)
    found = weights(InBatch(reduction="sum"), data, temperature)
    in_micro, length = found[data.micro], data.length[data.micro]
    shortest = length.gather(1, in_micro.argmax(1, keepdim=True))[:, 0] == length.amin(1)
    assert float(shortest.double().mean()) > 0.7
    assert rank_correlation(found, data.length.double()) < -0.7
    assert abs(rank_correlation(found, data.rewards)) < 0.3
    assert float((in_micro.sum(1) ** 2 / in_micro.square().sum(1) / 8).median()) < 0.4


def test_averaged_reference_logps_are_decided_by_the_mismatched_rewards():
    """Fact 2: `mean` follows the reward where mismatched answers score as matched ones, and is SFT at a gap of 5."""
    near, far = (weights(InBatch(), micro_batches(gap)) for gap in (0.0, 5.0))
    data = micro_batches(0.0)
    assert rank_correlation(near, data.rewards) > 0.7
    assert abs(rank_correlation(near, data.length.double())) < 0.3
    assert health(near, data.length).ess < 0.7
    assert health(far, data.length).ess > 0.97
