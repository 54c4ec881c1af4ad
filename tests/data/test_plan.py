"""The plan: exact micro-batches that nest, and the same steps on any number of devices."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from var.data.plan import ABSENT, MicroBatch, Plan, count_dropped, draw, make_plan, stack_by_group
from var.utils.errors import UserError


def plan(units: int = 40, micro: int = 4, total: int = 16, seed: int = 0, **settings: Any) -> Plan:
    """Return a plan of units with 1, 2, … response tokens, so that a sum of tokens identifies its units."""
    defaults = {"last_micro_batch": "drop", "last_step": "keep", "sequences_per_unit": 1}
    options = {"tokens": np.arange(1, units + 1), **defaults, **settings}
    return make_plan(micro_batch=micro, global_batch=total, seed=seed, **options)


def read_numbers(batches: Sequence[MicroBatch]) -> list[int]:
    """Return the numbers of the micro-batches that are not padding."""
    return [batch.number for batch in batches if not batch.padding]


def test_every_micro_batch_has_b_units_and_every_unit_occurs_once():
    made = plan()
    assert made.micro.shape == (10, 4)
    assert sorted(made.micro.ravel()) == list(range(40))
    assert made.micro.ravel().tolist() != list(range(40))
    assert made.tokens.tolist() == (made.micro + 1).sum(1).tolist()
    assert made.sequences.tolist() == [4] * 10
    assert (made.window, made.steps, made.dropped) == (4, 3, 0)  # 4 + 4 + 2 micro-batches
    assert plan(sequences_per_unit=2).sequences.tolist() == [8] * 10


def test_units_of_different_sizes_count_their_own_sequences():
    """Groups have i mod 3 + 1 responses. Dropped units are counted as units."""
    sizes = np.arange(42) % 3 + 1
    made = plan(units=42, sequences_per_unit=sizes)
    assert made.sequences.tolist() == sizes[made.micro].sum(1).tolist()
    assert len(set(made.sequences.tolist())) > 1
    assert made.dropped == 2
    step = list(made.batches(0, 0, 1))[:4]
    assert {batch.sequences for batch in step} == {float(sizes[made.micro[:4]].sum())}
    assert {batch.units for batch in step} == {16.0}
    kept = plan(units=42, sequences_per_unit=sizes, last_micro_batch="keep")
    last = kept.micro[-1][kept.micro[-1] != ABSENT]
    assert len(last) == 2
    assert (kept.sequences[-1], kept.tokens[-1]) == (sizes[last].sum(), (last + 1).sum())
    assert list(kept.batches(0, 0, 1))[-1].units == 4 * 2 + 2


def test_micro_batches_of_2_4_and_8_nest():
    """A micro-batch of 8 is two of 4, and each of those is two of 2. Runs over B see the same rows at the same step."""
    two, four, eight = (plan(micro=b).micro for b in (2, 4, 8))
    assert (two.reshape(-1, 4) == four).all()
    assert (four.reshape(-1, 8) == eight).all()


@pytest.mark.parametrize("last_step", ["keep", "drop"])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_and_accumulation_do_not_change_the_steps(last_step, epoch, world):
    """Ranks 1, 2 and 4 with 4, 2 and 1 accumulated micro-batches have the same micro-batches and divisors per step.

    With 3 ranks, each has 2, and two of the 6 are padding.
    """
    made = plan(last_step=last_step)
    order = made.epoch(epoch)
    ranks = [list(made.batches(epoch, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {made.length(world)}
    real = [batch for turn in zip(*ranks, strict=True) for batch in turn if not batch.padding]
    if world == 1:
        assert read_numbers(real) == order.tolist()
    for start in range(0, len(real), made.window):
        step = real[start : start + made.window]
        assert set(read_numbers(step)) == set(order[start : start + made.window].tolist())
        units = made.micro[read_numbers(step)]
        assert {batch.tokens for batch in step} == {float((units + 1).sum())}
        assert {batch.sequences for batch in step} == {batch.units for batch in step} == {float(units.size)}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1), (3, 2), (2, 4), (4, 3)])
def test_progress_after_each_step_converts_to_other_ranks(before: int, now: int, passes: int) -> None:
    """11 micro-batches in steps of 4: 3 steps per epoch, the last one short. Passes repeat complete steps only."""
    made = plan(units=44, micro=4, total=16, last_step="keep" if passes == 1 else "drop")

    def count_turns(world: int) -> list[int]:
        """Return a rank's micro-batches after each step of two epochs."""
        sizes = [min(made.window, len(made.micro) - at) for at in range(0, len(made.micro), made.window)]
        return np.cumsum([-(-size // world) for size in sizes * passes * 2]).tolist()

    for old, new in zip(count_turns(before), count_turns(now), strict=True):
        assert made.convert_progress(old, before, now, passes) == new


def test_two_ranks_get_micro_batches_in_serpentine_order():
    """Work 1 to 8: 8|7, then 5|6 in the other direction, and so on. Each rank has 18 of 36."""
    work = np.array([3, 8, 1, 6, 5, 2, 7, 4])
    made = replace(plan(units=8, micro=1, total=8), micro=np.arange(8)[:, None], work=work)
    ranks = [work[read_numbers(list(made.batches(0, rank, 2)))].tolist() for rank in range(2)]
    assert ranks == [[8, 5, 4, 1], [7, 6, 3, 2]]


def test_work_is_balanced_per_turn_and_per_step():
    """With FSDP each turn waits for the slowest rank, with DDP each step does. Lengths are log-normal."""
    lengths = np.random.default_rng(0).lognormal(5, 0.7, 512).round()
    made = plan(units=512, micro=1, total=64, work=lengths, tokens=lengths)
    unbalanced = lengths[made.micro[:, 0]].reshape(8, 8, 8)
    balanced = np.stack([made.work[read_numbers(list(made.batches(0, rank, 8)))] for rank in range(8)], -1)

    def compute_waiting(work: np.ndarray) -> float:
        """Return the work of the slowest rank over the mean, for work [turns, ranks]."""
        return float(work.max(1).sum() / work.mean(1).sum())

    assert compute_waiting(balanced) < 1.4 < 2.2 < compute_waiting(unbalanced.reshape(64, 8))
    assert compute_waiting(balanced.reshape(8, 8, 8).sum(1)) < 1.2 < 1.3 < compute_waiting(unbalanced.sum(1))


def test_short_step_has_its_own_divisors_and_padding_for_the_ranks():
    """The divisor is the step's own, not that of a complete one (Lightning-AI/pytorch-lightning #19987).

    10 micro-batches in steps of 4 leave 2 to 4 ranks. Two ranks get the last one again as padding, so that no rank
    waits.
    """
    made = plan()
    last = [list(made.batches(0, rank, 4))[-1] for rank in range(4)]
    totals = (float(made.tokens[8:].sum()), 8.0, 8.0)
    more, less = (8, 9) if made.work[8] >= made.work[9] else (9, 8)
    assert last == [(more, *totals, False), (less, *totals, False), *[(less, *totals, True)] * 2]
    dropped = plan(last_step="drop")
    assert (len(dropped.micro), dropped.steps, dropped.dropped) == (8, 2, 8)
    assert (dropped.micro == made.micro[:8]).all()


def test_short_micro_batch_is_dropped_kept_or_an_error():
    assert plan(units=10).micro.shape == (2, 4)
    assert plan(units=10).dropped == 2
    kept = plan(units=10, last_micro_batch="keep", sequences_per_unit=2)
    assert kept.micro.shape == (3, 4)
    assert (kept.micro[2] == ABSENT).tolist() == [False, False, True, True]
    assert kept.tokens[2] == (kept.micro[2, :2] + 1).sum()
    assert kept.sequences.tolist() == [8, 8, 4]
    assert kept.dropped == 0
    assert plan(units=12, last_micro_batch="error").micro.shape == (3, 4)
    assert plan(units=3, last_micro_batch="keep").micro.shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"units": 10, "last_micro_batch": "error"},
            r"^data\.last_micro_batch=error: 10 units do not divide into micro-batches of 4, 2 are left over\.",
        ),
        ({"total": 6}, r"^data\.global_batch=6 must be a multiple of data\.micro_batch=4"),
        ({"units": 3}, r"^3 units are too few for a complete micro-batch of 4"),
        ({"units": 12, "last_step": "drop"}, r"^12 units are too few for a complete micro-batch of 4 and step of 16"),
    ],
)
def test_units_that_make_no_step_are_an_error(options, message):
    with pytest.raises(UserError, match=message):
        plan(**options)


def test_epoch_permutes_complete_steps_and_keeps_every_unit_once():
    made = plan(units=98, micro=2, total=8)  # 49 micro-batches: 12 complete steps and a short one
    first, second, third = (made.epoch(epoch) for epoch in (0, 1, 2))
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
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_runs_with_different_b_have_the_same_units_in_each_step(units, epoch):
    """74 units fill four steps of 16 and 10 places of a fifth, which stays last for any B."""
    steps = []
    for made in (plan(units=units, micro=b, last_micro_batch="keep") for b in (2, 4, 8)):
        rows = made.micro[made.epoch(epoch)]
        steps.append([frozenset(s[s >= 0]) for s in np.split(rows, range(made.window, len(rows), made.window))])
    assert steps[0] == steps[1] == steps[2]


def test_hash_depends_on_order_data_and_steps():
    """A checkpoint resumes only with the same hash (NVIDIA-NeMo/RL #2519)."""
    made = plan()
    assert made.hash == plan().hash
    longer = np.arange(1, 41)
    longer[7] += 1
    others = [
        plan(seed=1), plan(units=44), plan(tokens=longer), plan(micro=8), plan(total=8), plan(sequences_per_unit=2),
        replace(made, micro=made.micro[::-1]), replace(made, seed=9),
    ]  # fmt: skip
    assert len({made.hash, *(other.hash for other in others)}) == 9


def test_draw_takes_all_or_the_positive_advantages():
    advantages = np.array([0.5, -1.0, 0.0, 2.0, 1e-9])
    assert draw(advantages, "all", seed=0).tolist() == [0, 1, 2, 3, 4]
    assert draw(advantages, "uniform", seed=0).tolist() == [0, 3, 4]
    assert set(draw(advantages, "priority", seed=0)) <= {0, 3}  # 1e-9 is positive, but is practically never drawn
    assert len(draw(advantages, "priority", seed=0)) == 3


def test_priority_draw_is_proportional_to_the_positive_part():
    """Fractions 1/8, 2/8 and 5/8 of 30,000 draws: four standard errors are below 0.012. Equal rows are drawn alike."""
    advantages = np.tile([1.0, -7.0, 2.0, 0.0, 5.0], 10_000)
    drawn = draw(advantages, "priority", seed=3)
    assert len(drawn) == 30_000
    fractions = np.bincount(drawn % 5, minlength=5) / 30_000
    assert fractions == pytest.approx([1 / 8, 0, 2 / 8, 0, 5 / 8], abs=0.012)
    assert fractions[[1, 3]].tolist() == [0, 0]
    assert (np.bincount(drawn) > 1).any()  # with replacement
    assert np.mean(drawn) == pytest.approx(25_000, rel=0.015)


def test_draw_depends_on_the_seed_and_not_on_the_scale():
    advantages = np.linspace(-1, 1, 100, dtype=np.float32)
    first = draw(advantages, "priority", seed=1).tolist()
    assert first == draw(advantages, "priority", seed=1).tolist()
    assert first != draw(advantages, "priority", seed=2).tolist()
    assert first == draw(advantages * 1000, "priority", seed=1).tolist()


@pytest.mark.parametrize("kind", ["all", "uniform", "priority"])
def test_draw_without_a_positive_advantage_is_an_error(kind):
    with pytest.raises(UserError, match=r"^no response's reward exceeds V\(x\).*loss\.value"):
        draw(np.array([-1.0, 0.0]), kind, seed=0)


def test_stacked_groups_keep_the_order_of_the_data():
    """Groups of two, one and three."""
    found = stack_by_group(np.array([7, 0, 7, 3, 7, 0]), np.array([10, 11, 12, 13, 14, 15]))
    assert found.tolist() == [[11, 15, ABSENT], [13, ABSENT, ABSENT], [10, 12, 14]]
    assert stack_by_group(np.array([1, 0]), np.array([4, 9])).tolist() == [[9], [4]]


def test_many_dropped_sequences_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert count_dropped(plan(39), 39) == 3
    assert capsys.readouterr().out == ""
    assert count_dropped(plan(7), 7) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "Warning: 3 of 7 sequences do not fill the last micro-batch or step" in printed
