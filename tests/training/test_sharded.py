"""Stages of a run on several processes over gloo: evaluation and annotation, of a replicated and of a sharded model."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from tests.helpers.models import saved, tiny_model
from tests.helpers.runs import column, curve, launch, write_lines
from var.models.packing import pack
from var.models.policy import Policy
from var.models.sharding import shard

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
        launch(processes, str(folder / "jobs.json"), script="tests/helpers/ranks.py", timeout=300)


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


def test_live_reference_of_two_ranks_gives_the_curve_of_one_process(options, tmp_path):
    """A sharded one runs equally often on both ranks: in two passes, also for a last micro-batch of one sequence.

    It also runs in evaluations between the steps. At the end, each rank holds the policy and one reference.
    """
    lines = [
        {"id": f"r{i}", "prompt": f"{i}?", "responses": [{"text": "ab" * (30 + i), "score": i}]} for i in range(20)
    ]
    common = [
        *options, f"data.path={write_lines(tmp_path / 'rows.jsonl', lines)}", "loss=var", "reference=live",
        "loss.temperature_unit=reward", "trainer.precision=32-true", "data.micro_batch=8", "data.global_batch=16",
        "trainer.epochs=2", "data.last_step=keep", "data.validation_prompts=3", "eval.every_n_steps=1",
        "eval.sampling.max_new_tokens=4",
    ]  # fmt: skip
    ways = {"one": (1, [], {}), "ddp": ranks(2, "ddp"), "fsdp": ranks(2, "fsdp")}
    run_ways(ways, common, tmp_path)
    for name, (count, *_) in ways.items():
        assert [result["policies"] for result in results(tmp_path / name)] == [2] * count
        for metric in ("train/loss", "train/weight/mean", "validation/kl"):
            one, other = (column(curve(tmp_path / way), metric) for way in ("one", name))
            assert len(one) == 4
            assert_close(other, one, rtol=1e-4, atol=2e-5)


@pytest.mark.long
def test_annotation_training_and_evaluation_in_bf16_agree_with_one_process(options, tmp_path):
    """A sharded reference annotates, so the policy's first log-ratios are about 0, and all ways have the same curve.

    13 prompts with two responses each leave the ranks with different numbers of annotations.
    """
    base = saved(tmp_path / "half", tiny_model(dtype=torch.bfloat16))
    common = [
        *options, f"model.path={base}", "loss=dpo", "trainer.precision=bf16-mixed", "data.micro_batch=2",
        "data.global_batch=4", "trainer.max_steps=3", "data.validation_prompts=3", "eval.sampling.responses=2",
        "eval.sampling.max_new_tokens=4", "eval.every_n_steps=2", "+reward@eval.reward=sentiment",
    ]  # fmt: skip
    ways = {"one": (1, [], {}), "gathered": ranks(2, "fsdp"), "blocks": ranks(2, "fsdp", gather=False)}
    run_ways(ways, common, tmp_path)
    for name in ways:
        losses, margins = (column(curve(tmp_path / name), f"train/{m}") for m in ("loss", "implicit_reward/margin"))
        assert abs(losses[0] - math.log(2)) < 5e-3  # on a CPU, bf16 rounds other packings of a row differently
        assert abs(margins[0]) < 0.05 * max(map(abs, margins))
        assert losses == pytest.approx(column(curve(tmp_path / "one"), "train/loss"), abs=0.03)
    gathered, blocks = (results(tmp_path / name)[0] for name in ("gathered", "blocks"))
    assert gathered == blocks


@pytest.fixture
def alone() -> Iterator[Any]:
    """Yield the device mesh of a group with this process only."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_gathered_in_bf16_and_kept_in_float32(alone):
    """Linear layers get bf16 weights, of which autocast makes no copy, and the residual stream is float32."""
    policy = Policy(tiny_model().train())
    expected = Policy(tiny_model())
    shard(policy, alone, torch.bfloat16, torch.device("cpu"))
    weights, stream = set(), set()
    for module in policy.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, _: weights.add(m.weight.dtype))
        if type(module).__name__.endswith("DecoderLayer"):
            module.register_forward_pre_hook(lambda _, inputs: stream.add(inputs[0].dtype))
    batch = pack([[1, 2, 3, 4, 5, 6]], [2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = policy(batch)
        assert_close(logps, expected(batch), rtol=0, atol=0.1)
    logps.sum().backward()
    assert (weights, stream) == ({torch.bfloat16}, {torch.float32})
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in policy.parameters() if p.grad is not None} == {torch.float32}
