"""Rows and batches of the exact testbed: they hold what a loss needs, and batches equal those of `pack`."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.testbed import every_row
from var.losses.var import VAR
from var.models.packing import pack
from var.requirements import Rollout
from var.testbed.methods import compute_loss, load_loss
from var.testbed.policies import TablePolicy
from var.testbed.rows import MICRO_BATCH, Rows, make_rows, pack_rows
from var.testbed.world import expectation
from var.weights.estimators import InBatch, in_batch_log_weights


def draw_answers(world, questions, answers, seed=0):
    """Return prompts [Q], responses [Q, K] and the generator."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(len(world), (questions,), generator=generator)
    return prompts, world.sample(prompts[:, None].expand(-1, answers), generator), generator


def test_a_batch_equals_that_of_pack(small):
    """Lengths, sequences, groups and divisors are equal. Log π_ref and rewards are those of the world."""
    rows = make_rows(small, load_loss("infonca"), *draw_answers(small, 5, 3))
    ours = pack_rows(small, load_loss("infonca"), rows, TablePolicy(small))
    lengths = small.responses.length[rows.responses].tolist()
    packed = pack([[0] * (n + 1) for n in lengths], [1] * 15, group=[i // 3 for i in range(15)])
    for name in ("length", "sequence", "group"):
        assert_close(getattr(ours, name), getattr(packed, name))
    assert (ours.global_tokens, ours.global_sequences, ours.global_groups) == (sum(lengths), 15, 5)
    assert_close(ours.sum_by_sequence(ours.reference_logps), small.logps[rows.prompts, rows.responses])
    assert_close(ours.rewards, small.rewards[rows.prompts, rows.responses])


def test_pairs_alternate_better_and_worse_and_differ(small):
    rows = make_rows(small, load_loss("dpo"), *draw_answers(small, 200, 4))
    better, worse = rows.responses[0::2], rows.responses[1::2]
    assert_close(rows.prompts[0::2], rows.prompts[1::2])
    assert 200 < len(better) < 400
    assert (better != worse).all()
    assert (small.rewards[rows.prompts[0::2], better] > small.rewards[rows.prompts[1::2], worse]).all()


def test_bradley_terry_labels_are_drawn_by_the_gap(small):
    """The fraction of pairs in the order of rewards is the mean of σ(|gap|), within 4 standard errors."""
    rows = make_rows(small, load_loss("dpo"), *draw_answers(small, 4000, 2), labels="bradley_terry")
    rewards = small.rewards[rows.prompts, rows.responses]
    gap = rewards[0::2] - rewards[1::2]
    expected = gap.abs().sigmoid()
    error = (expected * (1 - expected)).mean().sqrt() / len(gap) ** 0.5
    assert abs((gap > 0).double().mean() - expected.mean()) < 4 * error
    assert (gap < 0).any()


def test_single_rows_are_shuffled_with_their_columns(small):
    """KTO: the better response is desirable, also after the shuffle. GRPO: groups stay together."""
    prompts, answers, generator = draw_answers(small, 100, 2)
    rows = make_rows(small, load_loss("kto"), prompts, answers, generator)
    assert rows.unit == 1
    assert not (rows.group[0::2] == rows.group[1::2]).all()
    for question in rows.group.unique():
        mine = rows.group == question
        best = small.rewards[rows.prompts[mine], rows.responses[mine]].argmax()
        assert rows.columns["desirable"][mine].tolist() == [i == best for i in range(2)]
    together = make_rows(small, load_loss("grpo"), prompts, answers, generator)
    assert together.unit == 2
    assert (together.group[0::2] == together.group[1::2]).all()


def test_mismatched_logps_are_of_the_next_response(small):
    policy = TablePolicy(small)
    with torch.no_grad():
        policy.table += torch.arange(policy.table.numel()).reshape(policy.table.shape).sin()
    prompts, responses = torch.tensor([0, 1, 3]), torch.tensor([5, 2, 9])
    rows = Rows(prompts=prompts, responses=responses, group=prompts, unit=1, columns={})
    found = pack_rows(small, load_loss("kto"), rows, policy)
    mine = policy.logps()
    assert found.mismatched_logps.tolist() == [mine[0, 2], mine[1, 9], mine[3, 5]]
    assert found.mismatched_reference_logps.tolist() == [small.logps[0, 2], small.logps[1, 9], small.logps[3, 5]]


def test_only_the_best_answer_trains_under_rejection_sampling(small):
    prompts, answers, generator = draw_answers(small, 20, 5)
    rows = make_rows(small, load_loss("sft"), prompts, answers, generator, best=True)
    highest = small.rewards[prompts[:, None], answers].amax(1)
    assert_close(small.rewards[rows.prompts, rows.responses], highest[rows.group])


def test_advantages_use_the_exact_value_and_priority_draws_positive_ones(small):
    generator = torch.Generator().manual_seed(0)
    prompts, answers, _ = draw_answers(small, 200, 1)
    value = expectation(small.logps, small.rewards)
    rows = make_rows(small, load_loss("alol", draw="all"), prompts, answers, generator)
    assert_close(rows.columns["advantages"], small.rewards[rows.prompts, rows.responses] - value[rows.prompts])
    drawn = make_rows(small, load_loss("alol"), prompts, answers, generator)
    assert len(drawn) == (rows.columns["advantages"] > 0).sum() < 200
    assert (drawn.columns["advantages"] > 0).all()


def test_in_batch_weights_are_of_consecutive_micro_batches(small):
    """Rows 8 to 15 have the package's weights of one micro-batch. The mean over all rows is 1."""
    prompts, answers, generator = draw_answers(small, 5 * MICRO_BATCH, 1)
    loss = VAR(estimator=InBatch(reduction="sum"), temperature_unit="reward")
    rows = make_rows(small, loss, prompts, answers, generator)
    x, y = rows.prompts[8:16], rows.responses[8:16]
    cross = (x[:, None], y[None, :])
    expected = in_batch_log_weights(small.rewards[cross], small.logps[cross]).exp()
    found = rows.columns["weights"]
    assert_close(found[8:16] / found[8], expected / expected[0])
    assert found.mean().item() == pytest.approx(1)


def test_every_row_is_the_expectation(small):
    """SFT on all responses weighted by π_ref: the loss is the mean entropy of π_ref."""
    rows = every_row(small, torch.ones_like(small.logps))
    loss = compute_loss(small, load_loss("var_prompt", normalize="sequence"), rows, TablePolicy(small))
    assert loss.item() == pytest.approx(float(-expectation(small.logps, small.logps).mean()), rel=1e-12)


def test_the_current_policy_counts_as_the_one_that_sampled(small):
    """Old log-probabilities and values equal the current ones, without a gradient."""
    seen = {}

    def loss(logps, packed):
        seen.update(old=packed.old_logps, new=logps, values=packed.values, old_values=packed.old_values)
        return logps.sum(), {}

    loss.requires = (Rollout(),)
    rows = make_rows(small, loss, *draw_answers(small, 3, 2))
    compute_loss(small, loss, rows, TablePolicy(small, critic=True))
    assert_close(seen["old"], seen["new"].detach())
    assert not seen["old"].requires_grad
    assert seen["values"].requires_grad
    assert not seen["old_values"].requires_grad
