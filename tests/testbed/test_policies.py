"""Tabular policies start at π_ref, and their batches are what `pack` gives; rows carry what a loss names."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from var.losses.var import VAR
from var.models.packing import pack
from var.requirements import Need
from var.testbed.methods import load
from var.testbed.policies import MICRO_BATCH, Rows, Shared, Table, batch, every_row, loss_on, make_rows
from var.testbed.world import expectation
from var.weights.estimators import InBatch, in_batch_log_weights


def asked(world, questions, answers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(len(world), (questions,), generator=generator)
    return prompts, world.sample(prompts[:, None].expand(-1, answers), generator), generator


def needing(*needs, **more):
    return SimpleNamespace(needs=frozenset(needs), **more)


@pytest.mark.parametrize("kind", [Table, Shared])
def test_a_policy_starts_at_the_reference(small, kind):
    """To the last bit; with a critic its values are 0. Forward gives each row's tokens, one row after the other."""
    policy = kind(small, critic=True)
    assert_close(policy.logps(), small.logps, rtol=0, atol=0)
    prompts, responses = torch.tensor([2, 0]), torch.tensor([1, 14])  # 2 tokens, 3 tokens
    logps, values = policy(prompts, responses)
    assert_close(logps.detach(), torch.cat([small.token_logps[2, 1, :2], small.token_logps[0, 14]]), rtol=0, atol=0)
    assert_close(values.detach(), torch.zeros(5).double())
    assert kind(small)(prompts, responses)[1] is None


def test_shared_parameters_move_prompts_without_data_and_a_table_does_not(small):
    for kind, moves in ((Table, False), (Shared, True)):
        policy = kind(small)
        policy(torch.tensor([0, 1]), torch.tensor([3, 4]))[0].sum().backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.1 * parameter.grad
        assert bool((policy.logps()[0] != small.logps[0]).any())
        assert bool((policy.logps()[2:] != small.logps[2:]).any()) == moves


def test_a_batch_is_what_pack_gives(small):
    """Lengths, sequences, groups, divisors; the reference's numbers are the world's, token by token."""
    rows = make_rows(small, load("infonca"), *asked(small, 5, 3))
    ours = batch(small, load("infonca"), rows)
    lengths = small.responses.length[rows.responses].tolist()
    packed = pack([[0] * (n + 1) for n in lengths], [1] * 15, group=[i // 3 for i in range(15)])
    for name in ("length", "sequence", "group"):
        assert_close(getattr(ours, name), getattr(packed, name))
    assert (ours.global_tokens, ours.global_sequences, ours.global_groups) == (sum(lengths), 15, 5)
    assert_close(ours.sum_by_sequence(ours.reference_logps), small.logps[rows.prompts, rows.responses])
    assert_close(ours.rewards, small.rewards[rows.prompts, rows.responses])


def test_pairs_alternate_better_and_worse_and_none_is_with_itself(small):
    rows = make_rows(small, load("dpo"), *asked(small, 200, 4))
    better, worse = rows.responses[0::2], rows.responses[1::2]
    assert_close(rows.prompts[0::2], rows.prompts[1::2])
    assert 200 < len(better) < 400
    assert (better != worse).all()
    assert (small.rewards[rows.prompts[0::2], better] > small.rewards[rows.prompts[1::2], worse]).all()


def test_bradley_terry_labels_are_drawn_by_the_gap(small):
    """Share of pairs whose better one has more reward: the mean of σ(|gap|), here within 4 standard errors."""
    rows = make_rows(small, load("dpo"), *asked(small, 4000, 2), labels="bradley_terry")
    rewards = small.rewards[rows.prompts, rows.responses]
    gap = rewards[0::2] - rewards[1::2]
    expected = gap.abs().sigmoid()
    error = (expected * (1 - expected)).mean().sqrt() / len(gap) ** 0.5
    assert abs((gap > 0).double().mean() - expected.mean()) < 4 * error
    assert (gap < 0).any()


def test_single_rows_are_shuffled_and_keep_what_is_theirs(small):
    """KTO: better ones are desirable, each row has its own mark after the shuffle; groups stay together elsewhere."""
    prompts, answers, generator = asked(small, 100, 2)
    rows = make_rows(small, load("kto"), prompts, answers, generator)
    assert rows.unit == 1
    assert not (rows.group[0::2] == rows.group[1::2]).all()
    for question in rows.group.unique():
        mine = rows.group == question
        best = small.rewards[rows.prompts[mine], rows.responses[mine]].argmax()
        assert rows.columns["desirable"][mine].tolist() == [i == best for i in range(2)]
    together = make_rows(small, load("grpo"), prompts, answers, generator)
    assert together.unit == 2
    assert (together.group[0::2] == together.group[1::2]).all()


def test_mismatched_logps_are_of_the_next_rows_response(small):
    policy = Table(small)
    with torch.no_grad():
        policy.table += torch.arange(policy.table.numel()).reshape(policy.table.shape).sin()
    prompts, responses = torch.tensor([0, 1, 3]), torch.tensor([5, 2, 9])
    rows = Rows(prompts=prompts, responses=responses, group=prompts, unit=1, columns={})
    found = batch(small, load("kto"), rows, policy)
    mine = policy.logps()
    assert found.mismatched_logps.tolist() == [mine[0, 2], mine[1, 9], mine[3, 5]]
    assert found.mismatched_reference_logps.tolist() == [small.logps[0, 2], small.logps[1, 9], small.logps[3, 5]]


def test_only_the_best_answer_trains_under_rejection_sampling(small):
    prompts, answers, generator = asked(small, 20, 5)
    rows = make_rows(small, load("sft"), prompts, answers, generator, best=True)
    highest = small.rewards[prompts[:, None], answers].amax(1)
    assert_close(small.rewards[rows.prompts, rows.responses], highest[rows.group])


def test_advantages_have_the_exact_value_and_draw_the_positive(small):
    generator = torch.Generator().manual_seed(0)
    prompts, answers, _ = asked(small, 200, 1)
    value = expectation(small.logps, small.rewards)
    rows = make_rows(small, load("alol", draw="all"), prompts, answers, generator)
    assert_close(rows.columns["advantages"], small.rewards[rows.prompts, rows.responses] - value[rows.prompts])
    drawn = make_rows(small, load("alol"), prompts, answers, generator)
    assert len(drawn) == (rows.columns["advantages"] > 0).sum() < 200
    assert (drawn.columns["advantages"] > 0).all()


def test_in_batch_weights_are_of_consecutive_micro_batches(small):
    """The package's estimator on rows 8 to 15, by hand from the world's numbers; the mean over all rows is 1."""
    prompts, answers, generator = asked(small, 5 * MICRO_BATCH, 1)
    loss = VAR(estimator=InBatch(reduction="sum"))
    rows = make_rows(small, loss, prompts, answers, generator)
    x, y = rows.prompts[8:16], rows.responses[8:16]
    cross = (x[:, None], y[None, :])
    expected = in_batch_log_weights(small.rewards[cross], small.logps[cross]).exp()
    found = rows.columns["weights"]
    assert_close(found[8:16] / found[8], expected / expected[0])
    assert found.mean().item() == pytest.approx(1)


def test_every_row_is_the_expectation(small):
    """SFT on all answers by π_ref's probabilities: −E_x E_{π_ref}[log π_ref], the mean entropy."""
    rows = every_row(small, torch.ones_like(small.logps))
    loss = loss_on(small, load("var_prompt", normalize="sequence"), rows, Table(small))
    assert loss.item() == pytest.approx(float(-expectation(small.logps, small.logps).mean()), rel=1e-12)


def test_what_was_sampled_is_of_the_policy_as_it_is(small):
    """At the rollout the ratio is 1 and the values the critic's: no loss but the policy gradient's."""
    seen = {}

    def loss(logps, packed):
        seen.update(old=packed.old_logps, new=logps, values=packed.values, old_values=packed.old_values)
        return logps.sum(), {}

    loss.needs = frozenset({Need.ROLLOUT})
    rows = make_rows(small, needing(Need.ROLLOUT), *asked(small, 3, 2))
    loss_on(small, loss, rows, Table(small, critic=True))
    assert_close(seen["old"], seen["new"].detach())
    assert not seen["old"].requires_grad
    assert seen["values"].requires_grad
    assert not seen["old_values"].requires_grad
