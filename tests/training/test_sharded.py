"""Stages of a run on several processes over gloo: evaluation and annotation, of a replicated and of a sharded model."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from tests.helpers.runs import column, curve, launch

Way = tuple[int, list[str], dict[str, Any]]
"""Processes, overrides, and attributes of the training module."""


def run_ways(ways: dict[str, Way], common: list[str], folder: Path) -> None:
    """Train each way in folder/<its name>, with a cache of its own."""
    for processes in sorted({way[0] for way in ways.values()}):
        jobs = [
            (str(folder / name), [*common, *more, f"annotation_cache={folder}/{name}/store"], attributes)
            for name, (count, more, attributes) in ways.items()
            if count == processes
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        launch(processes, str(folder / "jobs.json"), script="tests/helpers/ranks.py", timeout=150)


def results(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluation results of each rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("result-*.json"))]


def ranks(count: int, strategy: str, **attributes: Any) -> Way:
    """Return a way on several processes."""
    return count, [f"strategy={strategy}", f"trainer.devices={count}"], attributes


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_evaluation_is_shared_among_ranks_and_equals_one_process(count, options, tmp_path):
    """Three prompts: one rank of two has more than the other, and one of four has none.

    Every rank has the complete results, after each step, whether a sharded policy is gathered for sampling or
    runs block by block.
    """
    common = [
        *options, "loss=dpo", "trainer.precision=32-true", "data.micro_batch=1", "data.global_batch=4", "data.limit=7",
        "trainer.epochs=2", "data.validation_prompts=3", "eval.sampling.responses=2", "eval.every_n_steps=1",
        "eval.sampling.max_new_tokens=6", "+reward@eval.reward=sentiment", "data.responses=both",
    ]  # fmt: skip
    ways = {
        "one": (1, [], {}),
        "ddp": ranks(count, "ddp"),
        "fsdp": ranks(count, "fsdp"),
        "blocks": ranks(count, "fsdp", gather=False),
    }
    run_ways(ways, common, tmp_path)
    (expected,) = results(tmp_path / "one")
    assert expected["kl"]["mean"] > 1e-3
    for name in ("ddp", "fsdp", "blocks"):
        found = results(tmp_path / name)
        assert len(found) == count
        assert all(result == found[0] for result in found)
        assert (tmp_path / name / "samples.jsonl").read_text() == (tmp_path / "one" / "samples.jsonl").read_text()
        for metric in ("reward", "length", "kl", "win_rate"):
            one, other = (column(curve(tmp_path / way), f"validation/{metric}") for way in ("one", name))
            assert_close(other, one, rtol=0, atol=2e-5)
