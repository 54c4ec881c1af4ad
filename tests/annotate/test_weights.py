"""Weights of a training set: which responses are left out, and how they are counted."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import composed
from var.training.run import Run


def prepare(options: list[str], folder: Path, *words: str) -> Run:
    folder.mkdir(exist_ok=True)
    run = Run.compose(composed(*options, *words), folder)
    run.data.prepare()
    return run


@pytest.mark.parametrize("loss", ["var_grouped", "var_global"])
def test_roulette_is_drawn_by_the_seed_of_the_data(loss: str, options: list[str], tmp_path: Path) -> None:
    """39 responses, of three to each prompt. Those that are left have about the same weights as before, as a group."""
    words = [f"loss={loss}", "loss.temperature=0.5"]
    whole = prepare(options, tmp_path / "whole", *words).data.training_set.weights
    words += ["loss.min_weight=1", "loss.roulette=true"]
    first, again = (prepare(options, tmp_path / name, *words) for name in ("first", "again"))
    other = prepare(options, tmp_path / "other", *words, "data.seed=1")
    assert whole is not None
    weights, report = first.data.training_set.weights, first.data.report
    assert weights is not None
    assert again.data.training_set.weights.equal(weights)  # type: ignore[union-attr]
    assert not other.data.training_set.weights.equal(weights)  # type: ignore[union-attr]
    large = whole >= 1
    assert bool((weights[large] > 0).all())
    small = weights[~large & (weights > 0)]
    assert len(small.unique()) == 1  # all have the minimum
    lost = int((weights == 0).sum())
    assert 0 < lost < int((~large).sum())
    assert report.sequences_lost_in_roulette == lost
    assert report.zero_variance_groups_skipped in (None, 0)
    assert np.isin(first.data.training_set.members, np.flatnonzero(weights.numpy())).sum() == len(weights) - lost
