"""The plan: exact micro-batches that nest, and the same steps whatever the devices."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from var.data.plan import ABSENT, Plan, draw, make_plan
from var.training.datamodule import stack_by_group
from var.utils.errors import UserError

INF = float("inf")


def plan(units: int = 40, micro: int = 4, total: int = 16, seed: int = 0, **more: Any) -> Plan:
    """40 units of 1..40 response tokens each, so that a sum tells which units it is of."""
    settings = {"last_micro_batch": "drop", "last_step": "keep", "sequences_per_unit": 1, **more}
    tokens = settings.pop("tokens", np.arange(1, units + 1))
    return make_plan(tokens, micro_batch=micro, global_batch=total, seed=seed, **settings)


def test_every_micro_batch_has_exactly_b_units_and_every_unit_comes_once():
    made = plan()
    assert made.micro.shape == (10, 4)
    assert sorted(made.micro.ravel()) == list(range(40))
    assert made.tokens.tolist() == (made.micro + 1).sum(1).tolist()
    assert made.sequences.tolist() == [4] * 10
    assert (made.window, made.steps, made.dropped) == (4, 3, 0)  # 4 + 4 + 2 micro-batches
    assert plan(sequences_per_unit=2).sequences.tolist() == [8] * 10
    assert made.micro.ravel().tolist() != list(range(40))


def test_units_of_several_sizes_count_their_own_sequences():
    """A group of i mod 3 + 1 responses: sums of the units' own; what is left over is counted in units."""
    sizes = np.arange(42) % 3 + 1
    made = plan(units=42, sequences_per_unit=sizes)
    assert made.sequences.tolist() == sizes[made.micro].sum(1).tolist()
    assert len(set(made.sequences.tolist())) > 1
    assert made.dropped == 2
    step = list(made.batches(0, 0, 1))[:4]
    assert {share.sequences for share in step} == {float(sizes[made.micro[:4]].sum())}
    assert {share.units for share in step} == {16.0}
    kept = plan(units=42, sequences_per_unit=sizes, last_micro_batch="keep")
    last = kept.micro[-1][kept.micro[-1] != ABSENT]
    assert len(last) == 2
    assert (kept.sequences[-1], kept.tokens[-1]) == (sizes[last].sum(), (last + 1).sum())
    assert list(kept.batches(0, 0, 1))[-1].units == 4 * 2 + 2


def test_two_four_and_eight_nest():
    """A micro-batch of 8 is two of 4, and each of those two of 2: runs over B see the same rows at the same step."""
    two, four, eight = (plan(micro=b).micro for b in (2, 4, 8))
    assert (two.reshape(-1, 4) == four).all()
    assert (four.reshape(-1, 8) == eight).all()


@pytest.mark.parametrize("short", ["keep", "drop"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_ranks_and_accumulation_do_not_change_the_steps(short: str, epoch: int):
    """World 1, 2 and 4, or 4, 2 and 1 accumulated: step by step the same micro-batches and the same divisors."""
    made = plan(last_step=short)
    order = made.epoch(epoch)
    for world in (1, 2, 4):
        ranks = [list(made.batches(epoch, rank, world)) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {made.length(world)}
        merged = [batch for together in zip(*ranks, strict=True) for batch in together]
        real = [batch for batch in merged if batch.tokens != INF]
        if world == 1:
            assert [share.micro_batch for share in real] == order.tolist()
        for at in range(0, len(real), made.window):
            here = {share.micro_batch for share in real[at : at + made.window]}
            assert here == set(order[at : at + made.window].tolist())
            step = real[at : at + made.window]
            members = made.micro[[share.micro_batch for share in step]]
            assert {share.tokens for share in step} == {float((members + 1).sum())}
            assert {share.sequences for share in step} == {share.units for share in step} == {float(members.size)}


def test_ranks_get_like_work_side_by_side_and_over_a_step():
    """Work 1..8 on two ranks: 8|7, then 5|6 the other way round, and so on; each rank has 18 of 36."""
    work = np.array([3, 8, 1, 6, 5, 2, 7, 4])
    made = replace(plan(units=8, micro=1, total=8), micro=np.arange(8)[:, None], work=work)
    ranks = [[int(work[share.micro_batch]) for share in made.batches(0, rank, 2)] for rank in range(2)]
    assert ranks == [[8, 5, 4, 1], [7, 6, 3, 2]]
    lengths = np.random.default_rng(0).lognormal(5, 0.7, 512).round()
    made = plan(units=512, micro=1, total=64, work=lengths, tokens=lengths)
    orders = made.micro[:, 0].reshape(-1, 8, 8)
    shares = np.array([[made.work[s.micro_batch] for s in made.batches(0, rank, 8)] for rank in range(8)])

    def waiting(side_by_side: np.ndarray) -> float:
        """The dearest rank's work over the mean: [turns, ranks]."""
        return float(side_by_side.max(1).sum() / side_by_side.mean(1).sum())

    assert waiting(shares.T) < 1.4 < 2.2 < waiting(lengths[orders].reshape(64, 8))  # where each turn waits, as FSDP's
    steps = shares.reshape(8, 8, 8).sum(2)
    assert waiting(steps.T) < 1.2 < 1.3 < waiting(lengths[orders].sum(1))  # where each step does, as DDP's


def test_a_short_window_keeps_its_own_divisors_and_is_filled_for_the_ranks():
    """Divided by its own length, not by the window's: Lightning-AI/pytorch-lightning #19987.

    10 micro-batches in windows of 4 leave 2 to 4 ranks: two get the last one again, with infinite divisors, so that
    their loss is 0 and no rank waits.
    """
    made = plan()
    last = [list(made.batches(0, rank, 4))[-1] for rank in range(4)]
    tokens = float(made.tokens[8:].sum())
    more, less = (8, 9) if made.work[8] >= made.work[9] else (9, 8)
    assert last == [(more, tokens, 8.0, 8.0), (less, tokens, 8.0, 8.0), (less, INF, INF, INF), (less, INF, INF, INF)]
    dropped = plan(last_step="drop")
    assert (len(dropped.micro), dropped.steps, dropped.dropped) == (8, 2, 8)
    assert (dropped.micro == made.micro[:8]).all()


def test_a_short_micro_batch_is_dropped_kept_or_an_error():
    assert plan(units=10).micro.shape == (2, 4)
    assert plan(units=10).dropped == 2
    kept = plan(units=10, last_micro_batch="keep", sequences_per_unit=2)
    assert kept.micro.shape == (3, 4)
    assert (kept.micro[2] == ABSENT).tolist() == [False, False, True, True]
    assert kept.tokens[2] == (kept.micro[2, :2] + 1).sum()
    assert kept.sequences.tolist() == [8, 8, 4]
    assert kept.dropped == 0
    with pytest.raises(UserError, match=r"10 units do not divide into micro-batches of 4 \(2 are left over\)"):
        plan(units=10, last_micro_batch="error")
    assert plan(units=12, last_micro_batch="error").micro.shape == (3, 4)


def test_what_makes_no_step_is_an_error():
    with pytest.raises(UserError, match=r"data\.global_batch=6 is no multiple of data\.micro_batch=4"):
        plan(total=6)
    with pytest.raises(UserError, match=r"3 units make no whole micro-batch of 4"):
        plan(units=3)
    with pytest.raises(UserError, match=r"12 units make no whole micro-batch of 4 and step of 16"):
        plan(units=12, last_step="drop")
    assert plan(units=3, last_micro_batch="keep").micro.shape == (1, 4)


def test_an_epoch_permutes_whole_steps_and_shows_every_unit_once():
    made = plan(units=98, micro=2, total=8)  # 49 micro-batches: 12 whole steps and a short one
    first, second, third = (made.epoch(e) for e in (0, 1, 2))
    assert first.tolist() == list(range(49))
    for order in (second, third):
        assert sorted(order) == list(range(49))
        assert order[-1] == 48  # the short step stays last
        steps = order[:48].reshape(-1, 4)
        assert (steps == steps[:, :1] + np.arange(4)).all()
        assert (steps[:, 0] % 4 == 0).all()
    assert len({tuple(order) for order in (first, second, third)}) == 3
    assert made.epoch(1).tolist() == second.tolist()


@pytest.mark.parametrize("units", [40, 74])
def test_runs_that_differ_in_b_see_the_same_units_in_every_step_of_every_epoch(units: int):
    """Where units are missing too: 74 fill four steps of 16 and 10 places of a fifth, which stays last whatever B."""
    plans = [plan(units=units, micro=b, last_micro_batch="keep") for b in (2, 4, 8)]
    for epoch in (0, 1, 2):
        steps = []
        for made in plans:
            rows = made.micro[made.epoch(epoch)]
            steps.append([frozenset(s[s >= 0]) for s in np.split(rows, range(made.window, len(rows), made.window))])
        assert steps[0] == steps[1] == steps[2]


def test_the_hash_tells_order_data_and_window():
    """Resuming with another data set or order is refused by it: NVIDIA-NeMo/RL #2519."""
    made = plan()
    assert made.hash == plan().hash
    longer = np.arange(1, 41)
    longer[7] += 1
    others = [
        plan(seed=1), plan(units=44), plan(tokens=longer), plan(micro=8), plan(total=8), plan(sequences_per_unit=2),
        replace(made, micro=made.micro[::-1]), replace(made, seed=9),
    ]  # fmt: skip
    assert len({made.hash, *(other.hash for other in others)}) == 9


def test_a_draw_by_advantage_takes_all_or_the_positive_ones():
    advantages = np.array([0.5, -1.0, 0.0, 2.0, 1e-9])
    assert draw(advantages, "all", seed=0).tolist() == [0, 1, 2, 3, 4]
    assert draw(advantages, "uniform", seed=0).tolist() == [0, 3, 4]
    assert set(draw(advantages, "priority", seed=0)) <= {0, 3}  # 1e-9 is positive, but never comes
    assert len(draw(advantages, "priority", seed=0)) == 3


def test_a_priority_draw_is_in_proportion_to_the_positive_part():
    """Shares 1/8, 2/8 and 5/8 of 30,000 draws: four standard errors are below 0.012. Each row of a kind comes alike."""
    advantages = np.tile([1.0, -7.0, 2.0, 0.0, 5.0], 10_000)
    drawn = draw(advantages, "priority", seed=3)
    assert len(drawn) == 30_000
    share = np.bincount(drawn % 5, minlength=5) / 30_000
    assert share == pytest.approx([1 / 8, 0, 2 / 8, 0, 5 / 8], abs=0.012)
    assert share[[1, 3]].tolist() == [0, 0]
    assert (np.bincount(drawn) > 1).any()  # with replacement
    assert np.mean(drawn) == pytest.approx(25_000, rel=0.015)


def test_a_draw_is_its_seeds():
    advantages = np.linspace(-1, 1, 100, dtype=np.float32)
    first = draw(advantages, "priority", seed=1)
    assert first.tolist() == draw(advantages, "priority", seed=1).tolist()
    assert first.tolist() != draw(advantages, "priority", seed=2).tolist()
    assert draw(advantages * 1000, "priority", seed=1).tolist() == first.tolist()


@pytest.mark.parametrize("kind", ["all", "uniform", "priority"])
def test_a_draw_needs_a_positive_advantage(kind: Any):
    with pytest.raises(UserError, match=r"no response's reward is above V\(x\).*loss\.value"):
        draw(np.array([-1.0, 0.0]), kind, seed=0)


def test_members_of_a_group_stand_side_by_side():
    """Groups of two, one and three; within one, the order of the data."""
    found = stack_by_group(np.array([7, 0, 7, 3, 7, 0]), np.array([10, 11, 12, 13, 14, 15]))
    assert found.tolist() == [[11, 15, ABSENT], [13, ABSENT, ABSENT], [10, 12, 14]]
    assert stack_by_group(np.array([1, 0]), np.array([4, 9])).tolist() == [[9], [4]]
