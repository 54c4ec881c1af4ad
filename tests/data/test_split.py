"""Which rows a run uses, and which of them are held out."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.annotate.test_advantages import SETTINGS
from tests.helpers.runs import composed, write_lines
from var.data.read import read
from var.data.rows import Rows
from var.data.sources.files import Files
from var.data.split import draw, split
from var.training.run import Run
from var.utils.errors import UserError


def make_rows(folder: Path, order: list[int]) -> Rows:
    """Return rows of 40 prompts from four sources of 10 each, two rows per prompt, in this order."""
    records = [
        {"id": str(i), "prompt": f"prompt {i // 2}", "responses": ["yes"], "subset": f"source {i // 20}"} for i in order
    ]
    path = write_lines(folder / f"{hash(tuple(order))}.jsonl", records)
    return read(Files(path=str(path)), folder / "cache")


def test_sample_draws_prompts_from_the_whole_data_set(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, list(range(80)))
    settings = replace(SETTINGS, sample=20, seed=3)
    drawn = draw(rows, settings)
    ids = list(map(int, drawn.table["id"]))
    assert len(ids) == 40
    assert ids == sorted(ids)
    assert set(Counter(i // 2 for i in ids).values()) == {2}
    assert len(set(drawn.table["subset"])) == 4
    reverse = draw(make_rows(tmp_path, list(range(80))[::-1]), settings)
    assert set(reverse.table["id"]) == set(drawn.table["id"])
    others = [set(draw(rows, replace(settings, seed=seed)).table["id"]) for seed in range(4)]
    assert len(set(map(frozenset, others))) == 4
    assert len(draw(rows, replace(SETTINGS, limit=7))) == 7
    assert len(draw(rows, SETTINGS)) == 80


def test_held_out_prompts_are_not_the_first_of_the_draw(tmp_path: Path) -> None:
    """The draw and the split have different random numbers: otherwise the held-out prompts would depend on `sample`."""
    rows = make_rows(tmp_path, list(range(80)))
    settings = replace(SETTINGS, sample=20, validation_prompts=5)
    held_out, _, train = split(draw(rows, settings), settings)
    assert len(held_out) == 5
    assert len(train) == 30
    assert not np.isin(train.keys, held_out.keys).any()


def test_bad_samples_are_errors(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, list(range(80)))
    with pytest.raises(UserError, match=r"data\.sample=41: the data has 40 distinct prompts"):
        draw(rows, replace(SETTINGS, sample=41))
    with pytest.raises(UserError, match=r"data\.sample: must be at least 1"):
        replace(SETTINGS, sample=0)
    with pytest.raises(UserError, match=r"draws from all rows, and data.limit takes the first ones\. Set one of them"):
        replace(SETTINGS, sample=3, limit=3)


def test_run_reports_and_repeats_the_draw(tiny_folder: Path, tmp_path: Path) -> None:
    records = [{"id": str(i), "prompt": f"prompt {i}", "responses": ["yes"]} for i in range(40)]
    path = write_lines(tmp_path / "rows.jsonl", records)
    used = []
    for name in ("one", "two"):
        options = [
            f"model.path={tiny_folder}", "data=files", f"data.path={path}", "reward=sentiment", "loss=sft", "eval=off",
            "data.sample=12", "data.validation_prompts=2", "data.global_batch=2", "data.micro_batch=2",
            *(f"{key}={tmp_path}/{key}" for key in ("cache", "annotation_cache", "runs")),
        ]  # fmt: skip
        run = Run.compose(composed(*options), tmp_path / name)
        run.data.prepare()
        report = json.loads(json.dumps(run.data.report.to_json()))
        assert (report["rows"], report["rows_not_drawn"]) == (40, 28)
        assert "rows_beyond_limit" not in report
        used.append((run.data.training_set.rows.key, run.data.fingerprint))
        assert len(run.data.training_set.rows) == 10
    assert used[0] == used[1]
