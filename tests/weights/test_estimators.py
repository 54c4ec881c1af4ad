"""Estimators of Z(x): each closed form by hand in float64, then the claims of docs/method.md."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers.losses import double, make_batch
from tests.helpers.weights import estimate, make_inputs, weigh
from var.utils.errors import UserError
from var.weights.estimators import (
    Global,
    Grouped,
    InBatch,
    Prompt,
    Sampled,
    Value,
    in_batch_log_weights,
    normalize_log_weights,
)
from var.weights.health import weight_health
from var.weights.inputs import WeightInputs, micro_batch_inputs
from var.weights.prompt_values import prompt_values

# In-batch

PAIR = dict(
    rewards=[1.0, 2.0],
    length=[2, 3],
    reference_logps=double([-2.0, -6.0]),
    micro=torch.tensor([[0, 1]]),
    cross_rewards=double([[[1.0, 0.0], [0.5, 2.0]]]),
    cross_logps=double([[[-2.0, -6.0], [-4.0, -6.0]]]),
)
# The same as a micro-batch, from which a live reference computes weights.
PAIR_BATCH = make_batch(
    [2, 3], rewards=[1.0, 2.0], cross_rewards=[[1.0, 0.0], [0.5, 2.0]], cross_logps=[[-2.0, -6.0], [-4.0, -6.0]],
    reference_logps=[-1.0, -1.0, -1.0, -2.0, -3.0],
)  # fmt: skip


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (InBatch(reduction="mean"), [0.9525741268224334, 0.9525741268224334]),
        (InBatch(reduction="sum"), [0.9975273768433653, 0.7310585786300049]),
        (InBatch(reduction="none"), [0.8807970779778823, 0.9525741268224334]),
        (InBatch(reduction="mean", reference="own"), [0.9525741268224334, 0.8807970779778823]),
        (InBatch(reduction="sum", reference="own"), [0.9975273768433653, 0.2689414213699951]),
    ],
)
def test_in_batch_pair_is_a_sigmoid_of_the_row_difference(estimator, expected):
    """B = 2: w_i = σ(s_ii + r_ii/λ − s_ij − r_ij/λ). λ = 1/2, so r/λ = [[2, 0], [1, 4]].

    mean: s = log π_ref(y_j|x_i) / length_j = [[−1, −2], [−2, −2]]: σ(1 + 2), σ(2 − (−1)).
    sum: [[−2, −6], [−4, −6]]: σ(0 − (−6)), σ(−2 − (−3)). none: σ(2), σ(3).
    own: s_ij = s_jj. mean [−1, −2]: σ(1 − (−2)), σ(2 − 0). sum [−2, −6]: σ(0 − (−6)), σ(−2 − (−1)).
    """
    for inputs in (make_inputs(**PAIR), micro_batch_inputs(PAIR_BATCH)):
        assert_close(estimate(estimator, inputs, 0.5), double(expected), rtol=1e-14, atol=0)


def test_literal_weight_has_the_reference_in_the_normalizer_only():
    """B = 2, λ = 1/2: e^{r_ii/λ} / (π_ref(y_1|x_i) e^{r_i1/λ} + π_ref(y_2|x_i) e^{r_i2/λ})."""
    expected = [math.exp(2) / (1 + math.exp(-6)), math.exp(4) / (math.exp(-3) + math.exp(-2))]
    estimator = InBatch(reduction="sum", reference_in_numerator=False)
    for inputs in (make_inputs(**PAIR), micro_batch_inputs(PAIR_BATCH)):
        assert_close(estimate(estimator, inputs, 0.5), double(expected), rtol=1e-14, atol=0)
    with pytest.raises(UserError, match="reference_in_numerator has no effect with reduction=none"):
        InBatch(reduction="none", reference_in_numerator=False)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_in_batch_weights_follow_the_plan_and_a_short_micro_batch(reduction):
    """micro = [[2, 0], [1, −1]]: sequence 1 is alone, so its weight is 1. Sequences 2 and 0 have σ(1 − 0), σ(3 − 1).
    Sequence 3 is in no micro-batch. Cells of absent sequences do not enter, even as NaN."""
    nan = math.nan
    inputs = make_inputs(
        [3.0, 5.0, 1.0, 7.0],
        micro=torch.tensor([[2, 0], [1, -1]]),
        cross_rewards=double([[[1.0, 0.0], [1.0, 3.0]], [[5.0, nan], [nan, nan]]]),
        cross_logps=torch.zeros(2, 2, 2, dtype=torch.float64),
    )
    found = estimate(InBatch(reduction=reduction), inputs)
    assert_close(found, double([0.8807970779778823, 1.0, 0.7310585786300049, 0.0]), rtol=1e-14, atol=0)
    normalized = normalize_log_weights(found.log())
    assert_close(normalized.exp()[:3].mean().item(), 1.0)
    assert normalized[3] == -torch.inf


def test_in_batch_weights_are_in_0_to_1_and_rows_sum_to_1():
    torch.manual_seed(0)
    logps, rewards = -50 * torch.rand(6, 8, 8).double(), 20 * torch.randn(6, 8, 8).double()
    found = in_batch_log_weights(rewards, logps).exp()
    assert found.shape == (6, 8)
    assert bool(((found >= 0) & (found <= 1)).all())
    columns = [in_batch_log_weights(rewards.roll(-k, -1), logps.roll(-k, -1)) for k in range(8)]
    first_row = torch.stack([column.exp()[:, 0] for column in columns])  # each column of its softmax in turn
    assert_close(first_row.sum(0), torch.ones(6).double())


def test_in_batch_weights_ignore_a_prompt_offset_of_rewards():
    offset = double([[[7.0], [-3.0]]])
    moved = make_inputs(**{**PAIR, "cross_rewards": PAIR["cross_rewards"] + offset})
    assert_close(estimate(InBatch(), moved), estimate(InBatch(), make_inputs(**PAIR)))


@pytest.mark.parametrize(
    ("estimator", "inputs", "planned"),
    [
        (InBatch(), ("cross_rewards", "cross_logps"), True),
        (InBatch(reference="own"), ("cross_rewards", "reference_logps"), True),
        (InBatch(reduction="none"), ("cross_rewards",), True),
        (Prompt(), ("features",), False), (Value(), ("features",), False), (Sampled(), ("candidates",), False),
        (Prompt(baseline="zero"), (), False), (Grouped(drop_zero_variance=False), (), False), (Global(), (), False),
    ],
)  # fmt: skip
def test_inputs_follow_from_the_settings(estimator, inputs, planned):
    assert (estimator.inputs, estimator.needs_plan) == (inputs, planned)


# Grouped


@pytest.mark.parametrize(
    ("rewards", "group", "temperature", "expected"),
    [
        # K = 2: w = 2σ(Δr/λ) = 2σ(2), and 2 minus that. The group need not be adjacent. A group of one has weight 1.
        ([1.0, 9.0, 0.0], [1, 0, 1], 0.5, [1.7615941559557646, 1.0, 0.2384058440442354]),
        # K = 3, e^{r/λ} = 1, 2, 5: w = 3/8, 6/8, 15/8.
        (2 * double([1, 2, 5]).log(), [0, 0, 0], 2.0, [0.375, 0.75, 1.875]),
    ],
)
def test_grouped_weights_match_hand_computation(rewards, group, temperature, expected):
    found = estimate(Grouped(drop_zero_variance=False), make_inputs(rewards, group), temperature)
    assert_close(found, double(expected), rtol=1e-14, atol=0)


def test_grouped_weights_ignore_a_prompt_offset_of_rewards():
    torch.manual_seed(0)
    group = torch.arange(5).repeat_interleave(4)
    rewards, offset = torch.randn(20).double(), 30 * torch.randn(5).double()
    plain, moved = (make_inputs(r, group=group.tolist()) for r in (rewards, rewards + offset[group]))
    assert_close(
        estimate(Grouped(drop_zero_variance=False), moved, 0.5), estimate(Grouped(drop_zero_variance=False), plain, 0.5)
    )
    assert not torch.allclose(estimate(Global(), moved, 0.5), estimate(Global(), plain, 0.5))


DROPPING = [Grouped(drop_zero_variance=True), Prompt(baseline="zero", drop_zero_variance=True)]


@pytest.mark.parametrize("estimator", DROPPING)
def test_only_zero_variance_groups_are_dropped(estimator):
    """Dropped: two equal answers, and a group of one. Kept: a difference of 1e-9."""
    inputs = make_inputs([1, 1, 1, 0, 3, 0, 1e-9], group=[0, 0, 1, 1, 2, 3, 3])
    found = estimator(inputs, 1.0)
    assert (found == -torch.inf).tolist() == [True, True, False, False, True, False, False]
    assert_close(normalize_log_weights(found).exp().sum().item(), 4.0)
    assert bool((Grouped(drop_zero_variance=False)(inputs, 1.0) > -torch.inf).all())


@pytest.mark.parametrize("estimator", DROPPING)
def test_data_set_of_zero_variance_groups_has_no_weight(estimator):
    assert weigh(estimator, make_inputs([1, 1, 2, 2], group=[0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


# Prompt: groups with pseudo-responses


@pytest.mark.parametrize(
    ("constant", "temperature", "rtol"),
    [(0.0, 0.5, 1e-9), (6.0, 0.5, 1e-9), (-900.0, 0.5, 1e-9), (1e8, 1.0, 1e-6), (-1e8, 1.0, 1e-6)],
)
def test_prompt_weights_of_single_responses_match_hand_computation(constant, temperature, rtol):
    """K = 1: w = (1 + κ) u / (u + κ e^c), u = e^{r/λ}, V = 0. κ = 4, u = 2, 2/7: 10/6 and (10/7)/(30/7) sum to 2, so
    c = 0 and w = 5/3, 1/3. A constant added to all rewards goes into c, also at r/λ near ±1e8."""
    inputs = make_inputs(temperature * double([2, 2 / 7]).log() + constant)
    found = estimate(Prompt(kappa=4, baseline="zero"), inputs, temperature)
    assert_close(found, double([5 / 3, 1 / 3]), rtol=rtol, atol=0)


def test_prompt_weights_of_pairs_match_hand_computation():
    """K = κ = 2: w = 4u / (Σu + 2e^c). u = 9/2, 3/2 and 1/2, 1/6: 4u/8 and 4u/(8/3) have mean 1 at c = 0. A dropped
    zero-variance pair does not change c."""
    rewards, expected = double([4.5, 1.5, 0.5, 1 / 6]).log(), double([2.25, 0.75, 0.75, 0.25])
    found = estimate(Prompt(kappa=2, baseline="zero"), make_inputs(rewards, [0, 0, 1, 1]))
    assert_close(found, expected, rtol=1e-9, atol=0)
    more = make_inputs(torch.cat([rewards, double([5, 5])]), [0, 0, 1, 1, 2, 2])
    found = estimate(Prompt(kappa=2, baseline="zero", drop_zero_variance=True), more)
    assert_close(found, torch.cat([expected, double([0, 0])]), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [("ridge", [1.7615941559557646, 0.2384058440442354]), ("zero", [1.4621171572600098, 0.5378828427399902])],
)
def test_prompt_subtracts_the_value_of_the_prompt(baseline, expected):
    """Two prompts: V is the other prompt's reward, so (r − V)/λ = ±Δr/λ. κ = 1, Δr = 1, λ = 1/2: w = 2σ(±2). With V = 0
    it is r/λ minus its mean: 2σ(±1)."""
    inputs = make_inputs([1.0, 0.0], features=torch.zeros(2, 3))
    assert_close(estimate(Prompt(kappa=1, baseline=baseline), inputs, 0.5), double(expected), rtol=1e-9, atol=0)


def make_varied_inputs() -> WeightInputs:
    """Return 40 prompts of 1 to 4 responses. Rewards have an offset per prompt and a heavy tail."""
    torch.manual_seed(0)
    group = torch.repeat_interleave(torch.arange(40), torch.randint(1, 5, (40,)))
    rewards = torch.randn(len(group)).double() ** 3 + 2 * torch.randn(40).double()[group]
    return make_inputs(rewards, group=group.tolist(), features=torch.randn(40, 6))


@pytest.mark.parametrize("kappa", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("baseline", ["ridge", "zero"])
def test_prompt_weights_have_mean_1_and_a_bound(kappa, baseline):
    """c makes the bounded weights average 1. w ≤ K + κ, and a large reward comes near that."""
    inputs = make_varied_inputs()
    found = estimate(Prompt(kappa=kappa, baseline=baseline), inputs, 0.3)
    bound = torch.bincount(inputs.group)[inputs.group].double() + kappa
    assert_close(found.mean().item(), 1.0, rtol=1e-9, atol=0)
    assert bool((found <= bound * (1 + 1e-12)).all())
    assert float((found / bound).max()) > 0.8


def test_prompt_tends_to_grouped_and_to_the_uncapped_value():
    """κ → 0 is K softmax. κ → ∞ is exp((r − V)/λ) over its mean."""
    inputs = make_varied_inputs()
    assert_close(
        estimate(Prompt(kappa=1e-9), inputs), estimate(Grouped(drop_zero_variance=False), inputs), rtol=1e-6, atol=1e-6
    )
    value = normalize_log_weights(inputs.rewards - prompt_values(inputs)[inputs.group]).exp()
    assert_close(estimate(Prompt(kappa=1e12), inputs), value, rtol=1e-4, atol=1e-9)


# Value, sampled, global


def test_value_is_capped_in_units_of_the_mean():
    """r − V = ±1, λ = 1/2: e^{±2} over their mean is 2σ(±4) = 1.9640276, 0.0359724. cap = 3/2 bounds the first. Then
    the mean is lower, and division by it makes the largest weight exceed the cap."""
    inputs = make_inputs([1.0, 0.0], features=torch.zeros(2, 1))
    assert_close(estimate(Value(), inputs, 0.5), double([1.9640275800758169, 0.0359724199241831]))
    assert_close(estimate(Value(cap=1.5), inputs, 0.5), double([1.5, 0.0359724199241831]))
    trained = weigh(Value(cap=1.5), inputs, 0.5)
    assert_close(trained.mean().item(), 1.0)
    assert_close(trained[0].item(), 3 / 1.5359724199241831)


@pytest.mark.parametrize(
    ("cap", "expected"),
    [(None, [1.0, 1.0, 4.5]), (5.0, [6 / 13, 6 / 13, 27 / 13]), (2.0, [6 / 13, 6 / 13, 2])],
)
def test_sampled_divides_by_the_mean_over_its_candidates(cap, expected):
    """λ = 1/2. e^{r/λ} is 2, 6, 9 for rows of the prompts 1, 0, 1. It is 4, 8 for the candidates of prompt 0 and 1, 3
    for those of prompt 1, so Z = 6 and 2. The weights 2/2, 6/6, 9/2 have mean 13/6."""
    candidates = double([[4.0, 8.0], [1.0, 3.0]]).log() / 2
    inputs = make_inputs(double([2.0, 6.0, 9.0]).log() / 2, group=[1, 0, 1], candidates=candidates)
    assert_close(estimate(Sampled(candidates=2, cap=cap), inputs, 0.5), double(expected), rtol=1e-14, atol=0)
    assert_close(weigh(Sampled(candidates=2, cap=cap), inputs, 0.5).mean().item(), 1.0)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_sampled_computes_in_log_space(scale):
    """Rewards of ±10⁵ at λ = 0.01: e^{r/λ} overflows, its log does not."""
    rewards = scale * double([-1.0, 1.0])
    inputs = make_inputs(rewards, candidates=rewards[:, None])
    assert_close(estimate(Sampled(candidates=1, cap=None), inputs, 0.01), double([1.0, 1.0]))


def test_global_is_the_exponential_over_its_mean():
    """e^{r/λ} = 1, 2, 9 has mean 4."""
    inputs = make_inputs(3 * double([1, 2, 9]).log())
    assert_close(weigh(Global(), inputs, 3.0), double([0.25, 0.5, 2.25]), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *(
            (InBatch, options, "loss.estimator: reduction must be mean, sum or none, and reference cross or own")
            for options in ({"reduction": "max"}, {"reference": "both"})
        ),
        (
            InBatch, {"reduction": "none", "reference": "own"},
            "loss.estimator.reference=own has no effect with reduction=none, which omits π_ref",
        ),
        *(
            (Prompt, {"kappa": k}, f"loss.estimator.kappa must be above 0, got {k}. For κ = 0 use loss=var_grouped.")
            for k in (0, math.nan)
        ),
        (Prompt, {"baseline": "mean"}, "loss.estimator.baseline must be ridge or zero, got mean"),
        (Value, {"cap": 1}, "loss.estimator.cap must be above 1, since the mean weight is 1; got 1"),
        *(
            (Sampled, options, "loss.estimator: candidates must be at least 1, and cap above 1 or null")
            for options in ({"candidates": 0}, {"cap": 1.0}, {"cap": math.nan})
        ),
    ],
)  # fmt: skip
def test_invalid_settings_are_errors(kind, options, message):
    with pytest.raises(UserError) as error:
        kind(**options)
    assert str(error.value) == message


# log π_ref, summed and averaged


def make_micro_batches(gap: float) -> WeightInputs:
    """Return 32 micro-batches of 8 answers of 3 to 155 tokens at about 1.8 nats each, with rewards of unit variance.

    Under another prompt an answer loses `gap` of its reward and some log-probability per token.
    """
    torch.manual_seed(0)
    length = torch.randint(3, 156, (256,))
    rewards = torch.randn(256).double()
    micro = torch.arange(256).view(32, 8)
    others = 1 - torch.eye(8).double()
    per_token = -(1.8 + 0.4 * torch.randn(256).double()[micro][:, None, :] + 0.3 * others)
    return make_inputs(
        rewards, length=length.tolist(), micro=micro, cross_rewards=rewards[micro][:, None, :] - gap * others,
        cross_logps=per_token * length[micro][:, None, :],
    )  # fmt: skip


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [0.0, 2.0, 5.0])
def test_summed_logps_give_the_weight_to_the_shortest_answer(temperature, gap):
    """Fact 1: for every λ and gap, `sum` ranks by length, not by reward, and two rows of eight train."""
    inputs = make_micro_batches(gap)
    found = estimate(InBatch(reduction="sum"), inputs, temperature)
    in_micro, length = found[inputs.micro], inputs.length[inputs.micro]
    shortest = length.gather(1, in_micro.argmax(1, keepdim=True))[:, 0] == length.amin(1)
    assert float(shortest.double().mean()) > 0.7
    assert rank_correlation(found, inputs.length.double()) < -0.7
    assert abs(rank_correlation(found, inputs.rewards)) < 0.3
    assert float((in_micro.sum(1) ** 2 / in_micro.square().sum(1) / 8).median()) < 0.4


def test_averaged_logps_are_decided_by_the_mismatched_rewards():
    """Fact 2: `mean` follows the reward if mismatched answers score like matched ones, and is SFT at a gap of 5."""
    inputs = make_micro_batches(0.0)
    near, far = estimate(InBatch(), inputs), estimate(InBatch(), make_micro_batches(5.0))
    assert rank_correlation(near, inputs.rewards) > 0.7
    assert abs(rank_correlation(near, inputs.length.double())) < 0.3
    assert weight_health(near, inputs.length).ess < 0.7
    assert weight_health(far, inputs.length).ess > 0.97
