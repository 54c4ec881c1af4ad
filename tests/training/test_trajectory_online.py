"""Ways of running that must give the same curve, for losses that sample, pair or group; and then for every loss.

Every loss trains on one process, in twice as many micro-batches, and on two ranks under each strategy.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.runs import (
    assert_identical,
    assert_same,
    column,
    curve,
    fit,
    kill_and_resume,
    launch,
    run_folder,
    same_folders,
    write_lines,
)
from var.config.check import FOLDER
from var.models.packing import Packed
from var.training.module import AlignmentModule
from var.training.rollout import RolloutLoader

pytestmark = pytest.mark.trajectory


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 13 prompts with two to four weighted responses of different lengths."""
    draw = random.Random(0)
    records = []
    for i in range(13):
        texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(2, 14))) + "z" for _ in range(2 + i % 3)]
        responses = [{"text": text, "weight": draw.uniform(0.5, 1.5)} for text in texts]
        records.append({"id": f"r{i}", "prompt": f"question {i}?", "responses": responses})
    return write_lines(tmp_path_factory.mktemp("data") / "rows.jsonl", records)


@pytest.fixture
def options(rows: Path, tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Return a run's overrides. Prompts are sampled one by one, so that responses do not depend on other prompts."""
    return [
        "data=files", f"data.path={rows}", f"model.path={tiny_folder}", "reward=exact_number",
        "reward._target_=tests.helpers.rewards.Distinct",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs", "data.validation_prompts=0", "trainer.precision=64-true", "model.dtype=float64",
        "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "optim.optimizer.lr=3e-3",
        "data.last_micro_batch=keep", "generate.responses=3", "generate.batch=3", "generate.max_new_tokens=5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "loss", [("grpo",), ("grpo", "loss.normalize=token"), ("var_online",), ("ppo",), ("ppo", "loss.rollout.steps=2")],
    ids=" ".join,
)  # fmt: skip
def test_accumulation_gives_the_same_curve(loss, options, tmp_path):
    """1×8 and 4×2 prompts, in the short last step too: 13 prompts are a step of 8 and one of 5, in two epochs."""
    more = (f"loss={loss[0]}", *loss[1:], "data.global_batch=8")
    one, split = (fit(options, tmp_path / str(b), *more, f"data.micro_batch={b}") for b in (8, 2))
    assert len(column(one[2], "train/loss")) == 4
    assert min(column(one[2], "train/grad_norm")) > 1e-3
    assert_same(split, one)
    for name in ("rollout/reward", "rollout/length", "rollout/truncated", "nll", "reward/mean"):
        assert_close(column(split[2], f"train/{name}"), column(one[2], f"train/{name}"))
    if ratios := column(one[2], "train/ratio/mean"):  # to the policy that sampled: the same, or that of a step before
        assert (max(abs(ratio - 1) for ratio in ratios) > 1e-6) == ("loss.rollout.steps=2" in loss)


def test_groups_of_unequal_size_accumulate(options, tmp_path):
    """InfoNCA with 1×4, 2×2 and 4×1 groups of two to four responses: four groups per step and one in the last."""
    one, *others = (
        fit(options, tmp_path / str(b), "loss=infonca", "data.global_batch=4", f"data.micro_batch={b}")
        for b in (4, 2, 1)
    )  # fmt: skip
    sequences = one[0].data.training_set.plan.sequences
    assert max(sequences) > min(sequences[:-1])
    for other in others:
        assert_same(other, one)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rollout_trains_the_policy_that_sampled_it(accumulate, options, tmp_path, monkeypatch):
    """No batch is sampled before the previous step. So without old_logps the ratio is exactly 1."""
    sampled: list[torch.Tensor] = []
    sample_batches, step = RolloutLoader.sample_batches, AlignmentModule.training_step

    def flatten(module: Any) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()])

    def record(self: RolloutLoader, *arguments: Any) -> Any:
        sampled.append(flatten(self.module))
        return sample_batches(self, *arguments)

    def check(self: AlignmentModule, batch: Packed, index: int) -> Any:
        assert torch.equal(sampled[-1], flatten(self))
        return step(self, batch, index)

    monkeypatch.setattr(RolloutLoader, "sample_batches", record)
    monkeypatch.setattr(AlignmentModule, "training_step", check)
    fit(options, tmp_path / "run", "loss=grpo", "data.global_batch=4", f"data.micro_batch={4 // accumulate}")
    assert len(sampled) == 8
    assert not torch.equal(sampled[0], sampled[1])


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_resumed_run_equals_the_unbroken_one(loss, options, tmp_path):
    """Killed in the second epoch, two steps after a checkpoint: the same responses, and identical weights."""
    more = (
        f"loss={loss}", "data.global_batch=4", "data.micro_batch=2", "trainer.checkpoint_every_n_steps=3",
        "trainer.precision=32-true", "model.dtype=float32",
    )  # fmt: skip
    straight, resumed, order, before, after = kill_and_resume(
        RolloutLoader, "sample_batches", lambda batches: [(batch.ids, batch.target.tolist()) for batch in batches],
        lambda _: 5, options, tmp_path, *more,
    )  # fmt: skip
    assert len(order) == 8
    assert before[:3] + after == order
    assert_identical(straight, resumed, "train/loss")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_give_the_same_curve(strategy, options, tmp_path):
    """GRPO on two processes with gloo. Their responses differ in length, and the last step has a padding batch."""
    common = [
        *options, "loss=grpo", "data.micro_batch=2", "data.global_batch=4", "trainer.precision=32-true",
        "model.dtype=float32", "data.limit=6", "trainer.epochs=1",
    ]  # fmt: skip
    launch(1, *common, f"runs={tmp_path}/one")
    launch(2, *common, f"runs={tmp_path}/two", f"strategy={strategy}", "trainer.devices=2")
    same_folders(
        run_folder(tmp_path / "one"), run_folder(tmp_path / "two"),
        "train/loss", "train/nll", "train/grad_norm", "train/rollout/reward", "train/rollout/length",
    )  # fmt: skip


# --- every loss


LOSSES = sorted(path.stem for path in Path(FOLDER, "loss").glob("[!_]*.yaml") if path.stem != "custom")
# These take Z, or KTO's pairs, within a micro-batch, so another B is another objective.
PER_MICRO_BATCH = ("var", "var_own", "var_sum", "var_literal", "kto")
# What a loss needs on so little data.
HEAD = ["loss.value.development_prompts=2", "loss.value.epochs=2", "loss.value.largest=20"]
MORE = {"var_sampled": ["loss.estimator.candidates=3"], **{loss: HEAD for loss in LOSSES if loss.startswith("alol")}}


@pytest.mark.long
def test_every_loss_gives_the_same_curve_on_any_number_of_processes(options, tmp_path):
    """In float64. 13 prompts leave a short last step, in which one rank has less to do than the other, or nothing."""
    common = [*options, "data.global_batch=4", "trainer.epochs=1"]
    ways = {
        "one": (1, ["data.micro_batch=2"]),
        "accumulated": (1, ["data.micro_batch=1"]),
        "ddp": (2, ["data.micro_batch=2", "strategy=ddp", "trainer.devices=2"]),
        "fsdp": (2, ["data.micro_batch=2", "strategy=fsdp", "trainer.devices=2"]),
    }
    jobs = [(way, loss) for way in ways for loss in LOSSES if not (way == "accumulated" and loss in PER_MICRO_BATCH)]
    for processes in (1, 2):
        commands = [
            (str(tmp_path / way / loss), [*common, f"loss={loss}", *MORE.get(loss, []), *ways[way][1]])
            for way, loss in jobs if ways[way][0] == processes
        ]  # fmt: skip
        (tmp_path / "jobs.json").write_text(json.dumps(commands))
        launch(processes, str(tmp_path / "jobs.json"), script="tests/helpers/ranks.py", timeout=900)
    different = []
    for way, loss in jobs:
        expected, found = (
            (None, torch.load(tmp_path / w / loss / "weights.pt"), curve(tmp_path / w / loss)) for w in ("one", way)
        )
        assert max(column(expected[2], "train/grad_norm")) > 0, loss
        try:
            assert_same(found, expected, rtol=1e-6, atol=1e-7)
        except AssertionError as error:
            different.append(f"{way} {loss}: {str(error)[:300]}")
    assert not different, "\n".join(different)
