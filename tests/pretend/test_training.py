"""Train every loss on the pretend device: no CPU tensor meets one on it, and the host waits once per optimizer step."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.helpers.pretend_runs import train
from tests.helpers.runs import ROOT, assert_same, column, fit, write_lines
from var.losses.base import Metrics
from var.losses.sft import SFT
from var.models.packing import Packed

ALOL = ("loss.value.development_prompts=2", "loss.value.epochs=2")
LOSSES = sorted(path.stem for path in (ROOT / "conf" / "loss").glob("[!_]*.yaml") if path.stem != "custom")
LIVE = ("dpo", "kto", "var", "var_own")
STEP = "tolist at var/training/hooks.py:"  # the gradient norm and all metrics, in one copy
SAMPLING = " at var/sampling/"  # tests/pretend/test_sampling.py


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 10 prompts with two to four weighted responses of different lengths."""
    draw = random.Random(0)
    records = []
    for i in range(10):
        texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(2, 14))) + "z" for _ in range(2 + i % 3)]
        responses = [{"text": text, "weight": draw.uniform(0.5, 1.5)} for text in texts]
        records.append({"id": f"r{i}", "prompt": f"question {i}?", "responses": responses})
    return write_lines(tmp_path_factory.mktemp("data") / "rows.jsonl", records)


@pytest.fixture
def options(rows: Path, tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Return the overrides of a run of two steps of two micro-batches, each of which is logged."""
    return [
        "data=files", f"data.path={rows}", f"model.path={tiny_folder}", "reward=exact_number",
        "reward._target_=tests.helpers.rewards.Distinct",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", f"runs={tmp_path}/runs",
        "data.validation_prompts=0", "trainer.log_every_n_steps=1", "trainer.max_steps=2", "trainer.accelerator=cpu",
        "data.micro_batch=2", "data.global_batch=4", "generate.responses=3", "generate.max_new_tokens=5",
    ]  # fmt: skip


def check_steps(steps: list[list[str]]) -> None:
    """Assert that each step, without its sampling, waits once, for the gradient norm and the metrics."""
    assert len(steps) == 2
    for number, syncs in enumerate(steps, start=1):
        waits = [sync for sync in syncs if SAMPLING not in sync]
        assert len(waits) == 1, f"step {number} waits for the device {len(waits)} times:\n" + "\n".join(waits)
        assert waits[0].startswith(STEP)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_waits_once_per_optimizer_step(loss, options, tmp_path):
    _, steps, curve = train(options, tmp_path, f"loss={loss}", *(ALOL if loss.startswith("alol") else ()))
    check_steps(steps)
    assert len(column(curve, "train/loss")) == 2
    assert min(column(curve, "train/grad_norm")) > 0


@pytest.mark.parametrize("loss", LIVE)
def test_live_reference_waits_once_per_optimizer_step(loss, options, tmp_path):
    """Pairings of responses with other prompts are made by the data pipeline, not read back from the device."""
    _, steps, _ = train(options, tmp_path, f"loss={loss}", "reference=live")
    check_steps(steps)


@pytest.mark.parametrize("more", [("loss.rollout.steps=2",), ("loss.rollout.passes=2", "data.last_step=drop")])
def test_rollout_that_trains_several_times_waits_once_per_optimizer_step(more, options, tmp_path):
    """Then the numbers of the policy that sampled are kept."""
    _, steps, _ = train(options, tmp_path, "loss=ppo", *more)
    check_steps(steps)


@pytest.mark.parametrize("loss", ["sft", "dpo", "kto", "bradley_terry"])
def test_training_on_the_device_equals_training_on_the_cpu(loss, options, tmp_path):
    more = (f"loss={loss}", "data.validation_prompts=2", "eval.sampling.max_new_tokens=4", "optim.optimizer.lr=1e-2")
    run, _, curve = train(options, tmp_path / "device", *more)
    expected = fit(options, tmp_path / "cpu", *more)
    assert_same((run, {}, curve), expected, "train/loss", "train/grad_norm", weights=False, rtol=1e-5, atol=1e-6)
    if loss == "bradley_terry":
        assert run.validation.result == expected[0].validation.result
    else:  # sampled, scored, and compared with the reference
        found, other = run.validation.result, expected[0].validation.result
        assert found["after"] == other["after"]
        assert found["kl"]["mean"] == pytest.approx(other["kl"]["mean"], rel=1e-3)


def test_varlen_attention_gives_the_loss_of_packed_attention(options, tmp_path):
    """The kernel of GPUs is emulated. Prompts are shared with `packed`, and repeated for it."""
    packed, varlen = (train(options, tmp_path / kind, "loss=dpo", attention=kind)[2] for kind in ("packed", "varlen"))
    for name in ("train/loss", "train/grad_norm"):
        assert column(varlen, name) == pytest.approx(column(packed, name), rel=1e-4)


def test_varlen_attention_waits_once_per_optimizer_step(options, tmp_path):
    check_steps(train(options, tmp_path, "loss=sft", attention="varlen")[1])


@dataclass(frozen=True, kw_only=True)
class Careless(SFT):
    """SFT that reads its loss on the host."""

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics."""
        loss, metrics = super().__call__(logps, batch)
        assert loss.item() > 0
        return loss, metrics


def test_loss_that_waits_in_each_micro_batch_is_reported_with_its_line(options: Any, tmp_path: Any) -> None:
    _, steps, _ = train(options, tmp_path, "loss=sft", f"loss._target_={__name__}.Careless")
    with pytest.raises(AssertionError) as error:
        check_steps(steps)
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "loss.item()" in text)
    place = f"aten::_local_scalar_dense at tests/pretend/test_training.py:{line}"
    assert str(error.value).split("\n")[:3] == ["step 1 waits for the device 3 times:", place, place]
