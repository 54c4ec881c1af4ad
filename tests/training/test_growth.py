"""How the work of a start grows with rows. Operations are counted, since times vary."""

import gc
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.runs import composed, write_lines
from var.training.run import Run

LOSSES = {
    "sft": ["loss=sft", "data.responses=best"],
    "dpo": ["loss=dpo"],
    "var_grouped": ["loss=var_grouped"],
    "var": ["loss=var", "reward.mismatch_gap=1.0"],
}
ARRAYS = ("concatenate", "unique", "sort", "argsort", "lexsort", "searchsorted", "isin", "intersect1d", "cumsum")


class Count:
    """Calls of functions, and elements of arrays that NumPy copies, sorts or searches."""

    calls = 0
    elements = 0


@contextmanager
def counting() -> Iterator[Count]:
    """Count what this thread does within the context."""
    count = Count()

    def called(_: Any, event: str, __: Any) -> None:
        count.calls += event in ("call", "c_call")

    def measured(function: Any) -> Any:
        def call(first: Any, *rest: Any, **options: Any) -> Any:
            searched = rest[0] if function.__name__ == "searchsorted" else first
            count.elements += sum(map(np.size, searched)) if isinstance(first, list | tuple) else np.size(searched)
            return function(first, *rest, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ARRAYS:
            patch.setattr(np, name, measured(getattr(np, name)))
        gc.collect()
        gc.disable()  # it calls functions, too
        sys.setprofile(called)
        try:
            yield count
        finally:
            sys.setprofile(None)
            gc.enable()


def start(folder: Path, rows: int, loss: str, model: Path) -> list[Count]:
    """Prepare a run twice, with empty and with full caches; return what each took."""
    draw = random.Random(0)
    path = write_lines(
        folder / f"{rows}.jsonl",
        [
            {
                "prompt": f"number {i}",
                "responses": [{"text": "".join(draw.choices("abc", k=5)), "score": draw.random()} for _ in range(2)],
            }
            for i in range(rows)
        ],
    )
    options = [
        f"model.path={model}", "data=files", f"data.path={path}", "reward=score", "eval=off", *LOSSES[loss],
        "trainer.accelerator=cpu", "data.micro_batch=4", "data.global_batch=8", "data.validation_prompts=4",
        *(f"{key}={folder}/{rows}-{key}" for key in ("cache", "annotation_cache", "runs")),
    ]  # fmt: skip
    counts = []
    for name in ("first", "cached"):
        run = Run.compose(composed(*options), folder / f"{rows}-{name}")
        with counting() as count:
            run.data.prepare()
        counts.append(count)
    return counts


@pytest.mark.parametrize("loss", LOSSES)
def test_work_of_a_start_is_linear_in_the_rows(loss: str, tiny_folder: Path, tmp_path: Path) -> None:
    """From 200 to 400 rows it grows at most 2.3 times as much as from 100 to 200."""
    start(tmp_path, 50, loss, tiny_folder)  # what happens once per process
    measured = [start(tmp_path, rows, loss, tiny_folder) for rows in (100, 200, 400)]
    for name, few, more, most in zip(("first", "cached"), *measured, strict=True):
        for kind in ("calls", "elements"):
            a, b, c = (getattr(count, kind) for count in (few, more, most))
            assert c - b < 2.3 * (b - a) + 500, f"{name} start, {kind}: {a}, {b}, {c}"
    cached = [count.calls for _, count in measured]
    most = 1000 if loss == "var" else 300  # the cache has two files of pairs, and one for fewer rows
    assert cached[2] - cached[0] < most, f"a cached start calls a function for each row: {cached} calls"
