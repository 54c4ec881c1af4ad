"""Separate jobs that fill one table share the work, and no claim outlives its process."""

import os
import signal
import time

import numpy as np
import pytest

from tests.helpers.cache import fill, keys, open_table, shards
from tests.helpers.cache_workers import assert_sound, start_workers
from var.annotate import cache, cache_work
from var.annotate.cache_work import Work, claim

ITEMS = list(range(1200))


@pytest.mark.parametrize("count", [2, 4])
def test_jobs_on_one_machine_compute_each_item_once(tmp_path, count):
    root = tmp_path / "cache"
    jobs, results = start_workers(root, [ITEMS] * count, shard=64, seconds=0.001)
    for job in jobs:
        job.join(120)
        assert job.exitcode == 0
    computed, complete = zip(*(results.get() for _ in jobs), strict=True)
    assert all(complete)
    assert len(ITEMS) <= sum(computed) <= 1.1 * len(ITEMS), computed
    assert max(computed) <= 2 * len(ITEMS) / count, computed
    assert_sound(root, range(len(ITEMS)))


def test_jobs_with_other_rows_in_between_share_the_common_ones(tmp_path):
    """One of them lacks every tenth row, and the other one has further rows before the common ones."""
    root, some = tmp_path / "cache", [i for i in ITEMS if i % 10]
    jobs, results = start_workers(root, [some, [*range(2000, 2100), *ITEMS]], shard=64, seconds=0.001)
    computed = sum(results.get()[0] for _ in jobs)
    assert 1300 <= computed <= 1.2 * 1300
    for job in jobs:
        job.join(60)


def test_jobs_on_two_machines_compute_few_items_twice(tmp_path):
    """They have no locks in common. Both compute the first items; then each continues at random places."""
    root = tmp_path / "cache"
    jobs, results = start_workers(root, [ITEMS] * 2, shard=32, seconds=0.002, machines=2)
    computed, complete = zip(*(results.get() for _ in jobs), strict=True)
    assert all(complete)
    assert sum(computed) <= 1.4 * len(ITEMS), computed
    for job in jobs:
        job.join(60)
    assert_sound(root, range(len(ITEMS)))


def test_items_of_a_killed_job_are_computed_by_the_others(tmp_path):
    """It held claims. The kernel has released them."""
    root = tmp_path / "cache"
    jobs, results = start_workers(root, [ITEMS] * 2, shard=200, seconds=0.002)
    time.sleep(0.3)  # both compute
    os.kill(jobs[0].pid, signal.SIGKILL)
    jobs[1].join(60)
    assert results.get()[1]
    assert_sound(root, range(len(ITEMS)))


def test_killed_jobs_lose_at_most_the_items_at_hand(tmp_path):
    root = tmp_path / "cache"
    jobs, _ = start_workers(root, [ITEMS] * 2, shard=50, seconds=0.002)
    until = time.monotonic() + 60
    while len(shards(open_table(root))) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    for job in jobs:
        os.kill(job.pid, signal.SIGKILL)
        job.join(60)
    missing = open_table(root).missing(keys(*ITEMS))
    assert not missing.all()
    assert sorted(fill(open_table(root), ITEMS, 50)) == np.flatnonzero(missing).tolist()
    assert_sound(root, range(len(ITEMS)))


def test_single_job_computes_in_order_in_complete_shards(tmp_path):
    """What it computes together, and so the rounding, does not depend on chance."""
    sizes = list[list[int]]()

    def compute(indices: np.ndarray, _: object) -> np.ndarray:
        sizes.append(indices.tolist())
        return indices * 1.0

    open_table(tmp_path).fill(keys(*range(100)), compute, 32)
    assert sizes == [list(range(begin, min(begin + 32, 100))) for begin in range(0, 100, 32)]


def test_claims_are_released_after_an_error(tmp_path):
    """The process lives on, as in a notebook."""

    def fail(indices: np.ndarray, _: object) -> np.ndarray:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        open_table(tmp_path).fill(keys(*ITEMS), fail, 64)
    jobs, results = start_workers(tmp_path, [ITEMS], shard=64, seconds=0.0)
    assert results.get() == (len(ITEMS), True)
    jobs[0].join(60)


def test_job_waits_for_claimed_items_and_reports_it(tmp_path, monkeypatch):
    """A stopped process keeps its claims. Here they are released at the sixth look."""
    answers = iter([False] * 5 + [True])
    monkeypatch.setattr(cache_work, "claim", lambda name: next(answers))
    monkeypatch.setattr(cache, "LONGEST_PAUSE", 0.04)
    reports: list[str] = []
    assert fill(open_table(tmp_path, warn=reports.append), [1, 2], shard=100) == [1, 2]
    assert reports == ["annotation cache: waiting for 2 items that other processes compute."]


def test_ranks_of_one_job_do_not_wait_for_other_jobs(tmp_path, monkeypatch):
    """A sharded model would need them."""
    monkeypatch.setattr(cache_work, "claim", lambda name: False)
    assert fill(open_table(tmp_path), range(10), shard=100, rank=0, world=2) == [0, 2, 4, 6, 8]


def test_no_items_are_taken_twice():
    name = os.urandom(16)  # another run of the tests may hold a fixed one
    work = Work(keys(*range(40)), np.arange(0, 40, 2), name, 6)
    taken = list[int]()
    while work.left:
        places = work.take()
        assert 0 < len(places) <= 6
        taken += places.tolist()
        work.finish(places)
        work.release()
    assert taken == list(range(20))
    assert len(work.take()) == 0
    assert claim(name)
