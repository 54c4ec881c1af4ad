"""Annotation work is dealt to ranks by prompt: shared prompts are processed once, and ranks have equal work."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.annotators import ROWS, Lengths, make_micro, make_sequences
from tests.helpers.cache import keys, open_table
from var.annotate.annotator import Annotator
from var.annotate.cache_work import deal
from var.annotate.reference_logps import cached_cross_logps, cached_mismatched_logps, reference_logps
from var.annotate.rewards import cross_rewards
from var.data.row import Response, Row
from var.data.sequences import Sequences
from var.models.packing import Packed
from var.utils.distributed import Ranks

PROMPTS = 96


def make_rows(responses: int) -> tuple[Row, ...]:
    """Return rows whose prompts and responses are as skewed as those of preference data, a tenth as long."""
    draw = np.random.default_rng(0)

    def text(median: float, name: str) -> str:
        return f"{name} " + "x" * int(median * np.exp(draw.normal(0, 0.8)))

    return tuple(
        replace(
            ROWS[0],
            id=f"row-{i}",
            prompt=({"role": "user", "content": text(60, str(i))},),
            responses=tuple(Response(text=text(25, f"{i}.{k}"), score=float(k)) for k in range(responses)),
        )
        for i in range(PROMPTS)
    )


class Counting:
    """Replaces the reference. It counts the packed tokens that it processes, and returns zeros."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, packed: Packed) -> torch.Tensor:
        self.tokens += len(packed.input_ids)
        return torch.zeros(len(packed.target))


def count_tokens(
    make: Callable[..., Annotator], root: Path, world: int, responses: int, compute: Callable[..., Any]
) -> list[int]:
    """Return the tokens that each of `world` ranks, which are threads, processes in `compute(annotator, sequences)`."""
    barrier, found = threading.Barrier(world, timeout=60), [Counting() for _ in range(world)]
    annotators = [make(root=root, ranks=Ranks(r, world, lambda: barrier.wait() and None)) for r in range(world)]
    _, sequences = make_sequences(annotators[0], make_rows(responses), max_length=2048)
    for annotator, counting in zip(annotators, found, strict=True):
        annotator.reference.__dict__["_loaded"] = counting
    with ThreadPoolExecutor(world) as threads:
        list(threads.map(lambda annotator: compute(annotator, sequences), annotators))
    return [counting.tokens for counting in found]


def cross(annotator: Annotator, sequences: Sequences) -> None:
    """Compute B×B log-probabilities."""
    cached_cross_logps(annotator, sequences, make_micro(sequences, 8))


def pairs(annotator: Annotator, sequences: Sequences) -> None:
    """Compute the log-probabilities of DPO's pairs."""
    reference_logps(annotator, sequences, share=True)


@pytest.mark.parametrize(("compute", "responses"), [(cross, 2), (cross, 1), (pairs, 2)])
def test_eight_ranks_process_as_many_tokens_as_one(compute, responses, make, tmp_path):
    """Shared prompts stay together: at most a tenth more, and the busiest rank has at most 1.2 times the mean."""
    (one,) = count_tokens(make, tmp_path / "one", 1, responses, compute)
    eight = count_tokens(make, tmp_path / "eight", 8, responses, compute)
    assert sum(eight) <= 1.1 * one, (one, eight)
    assert max(eight) <= 1.2 * np.mean(eight), eight


def test_mismatched_pairs_are_balanced(make, tmp_path):
    """Each prompt has one pair, so that there is nothing to share."""

    def compute(annotator: Annotator, sequences: Sequences) -> None:
        cached_mismatched_logps(annotator, sequences, make_micro(sequences, 8))

    eight = count_tokens(make, tmp_path, 8, 1, compute)
    assert max(eight) <= 1.2 * np.mean(eight), eight


def test_cross_rewards_are_balanced_by_length(make, tmp_path):
    """Rewards share nothing; each rank scores about as much text as the others."""
    barrier, rewards = threading.Barrier(4), [Lengths() for _ in range(4)]
    annotators = [make(reward, tmp_path, ranks=Ranks(r, 4, lambda: barrier.wait() and None))
                  for r, reward in enumerate(rewards)]  # fmt: skip
    rows, sequences = make_sequences(annotators[0], make_rows(1)[:24], max_length=2048)
    micro = make_micro(sequences, 4)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda annotator: cross_rewards(annotator, rows, sequences, micro), annotators))
    assert all(np.array_equal(matrix, found[0]) for matrix in found)
    sizes = [sum(len(prompt) + len(text) for prompt, text, _ in reward.asked) for reward in rewards]
    assert max(sizes) <= 1.02 * np.mean(sizes), sizes


def test_dealt_items_are_complete_disjoint_and_in_order():
    """Items of a part are neighbors, and parts are in the order in which they begin."""
    draw = np.random.default_rng(1)
    part, cost = draw.integers(0, 40, 200), draw.exponential(size=200)
    dealt = [deal(keys(*range(200)), rank, 3, part, cost) for rank in range(3)]
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(200))
    owners = [set(part[mine]) for mine in dealt]
    assert sum(map(len, owners)) == len(set(part))
    begin = {label: int(np.flatnonzero(part == label)[0]) for label in set(part)}
    for mine in dealt:
        assert [(begin[part[i]], i) for i in mine] == sorted((begin[part[i]], i) for i in mine)
    work = [cost[mine].sum() for mine in dealt]
    assert max(work) - min(work) < max(cost[part == label].sum() for label in set(part))


def test_dealing_ignores_what_a_rank_sees_as_missing(tmp_path):
    """The second rank looks after the first has finished, and a third of the items was cached before."""
    open_table(tmp_path).write(keys(0, 1, 2), [0.0, 1.0, 4.0])
    part, cost = np.arange(9) // 3, np.array([1.0, 1, 1, 5, 1, 1, 2, 2, 2])
    seen = list[list[int]]()
    for rank in range(2):
        mine = list[int]()

        def compute(indices: np.ndarray, advance: Callable[[int], None], mine: list[int] = mine) -> list[float]:
            mine.extend(indices.tolist())
            return [float(i**2) for i in indices]

        open_table(tmp_path).fill(keys(*range(9)), compute, 2, rank, 2, part=part, cost=cost)
        seen.append(mine)
    assert seen == [[3, 4, 5], [6, 7, 8]]
