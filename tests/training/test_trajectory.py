"""Ways of running that must give one curve: accumulation, ranks, stored and live, resumed and straight."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from notebooks.tiny import SIZES
from tests.helpers.models import saved, spread
from tests.helpers.runs import ROOT, composed
from tests.helpers.runs import run_folder as only
from var.training.module import AlignmentModule
from var.training.run import Run
from var.utils.errors import UserError

pytestmark = pytest.mark.trajectory


def fit(options: list[str], folder: Path, *more: str) -> tuple[Run, Any, list[dict[str, str]]]:
    """Train as train.py does; returns the run, the policy's weights and the curve."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run.compose(composed(*options, *more), folder)
    torch.manual_seed(0)
    trainer, module = run.trainer(), run.module()
    trainer.fit(module, run.data, ckpt_path=run.checkpoint)
    return run, {name: value.clone() for name, value in module.policy.state_dict().items()}, curve(folder)


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(curve: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in curve if row.get(name)]


def same_folders(one: Path, two: Path, *names: str) -> None:
    """What two runs left: the weights and these columns, to the rounding of another number of processes."""
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert_close(b, a, rtol=1e-4, atol=1e-5)
    for name in names:
        assert_close(column(curve(two), name), column(curve(one), name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["sft", "var_grouped", "dpo"])
def test_accumulation_gives_one_curve(loss: str, options: list[str], tmp_path: Path) -> None:
    """1×8, 2×4, 8×1: the same weights, loss and gradient norm, in the short last step too (huggingface/trl #2175,
    Lightning-AI/pytorch-lightning #20350, #19987). 39 responses are four steps of 8 and one of 7."""
    results = {}
    for b in (8, 4, 1):
        more = (f"loss={loss}", "data.global_batch=8", f"data.micro_batch={b}")
        results[b] = fit(options, tmp_path / str(b), *more)
    for b in (4, 1):
        for name in ("train/loss", "train/grad_norm", "train/lr"):
            assert_close(column(results[b][2], name), column(results[8][2], name), rtol=1e-9, atol=1e-9)
        assert_close(results[b][1], results[8][1], rtol=1e-8, atol=1e-9)


def test_an_epoch_shorter_than_the_window_is_one_exact_step(options: list[str], tmp_path: Path) -> None:
    """Lightning-AI/pytorch-lightning #21808: accumulation is not ignored, nor is the divisor the full window's."""
    whole = fit(
        options, tmp_path / "a", "data.limit=2", "data.global_batch=8", "data.micro_batch=8", "trainer.epochs=3"
    )
    split = fit(
        options, tmp_path / "b", "data.limit=2", "data.global_batch=8", "data.micro_batch=2", "trainer.epochs=3"
    )
    assert whole[0].data.plan.steps == split[0].data.plan.steps == 1
    assert_close(split[1], whole[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "var", "var_own", "var_sum"])
def test_stored_and_live_reference_give_one_curve(loss: str, options: list[str], tmp_path: Path) -> None:
    """The reference run in each step and its stored float32 numbers differ by rounding alone."""
    more = (
        f"loss={loss}",
        "data.micro_batch=4",
        "data.global_batch=8",
        "trainer.precision=32-true",
        "trainer.epochs=3",
    )
    stored = fit(options, tmp_path / "stored", *more)
    live = fit(options, tmp_path / "live", *more, "reference=live")
    assert_close(column(live[2], "train/loss"), column(stored[2], "train/loss"), rtol=2e-5, atol=2e-5)
    moved = max(float((a - b).abs().max()) for a, b in zip(stored[1].values(), _start(stored[0]).values(), strict=True))
    apart = max(float((a - b).abs().max()) for a, b in zip(stored[1].values(), live[1].values(), strict=True))
    assert apart < 0.02 * moved


def test_a_live_weight_is_the_stored_one_where_others_vanish(options: list[str], tmp_path: Path) -> None:
    """Beside an answer of 3 letters one of 900 has the weight 0 under summed log π_ref, the first of the plan too."""
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for i in range(8):
            row = {"id": f"r{i}", "prompt": "?", "responses": [{"text": "ab" * (2 if i % 2 else 450), "score": i % 3}]}
            file.write(json.dumps(row) + "\n")
    more = (
        f"data.path={path}", "loss=var_sum", "data.micro_batch=2", "data.global_batch=4", "data.seed=2",
        "trainer.epochs=1", "data.max_length=1024", "loss.temperature_unit=reward",
    )  # fmt: skip
    stored, live = (fit(options, tmp_path / name, *more, f"reference={name}") for name in ("stored", "live"))
    expected = column(stored[2], "train/weight/mean")
    assert max(expected) > 0.5
    assert_close(column(live[2], "train/weight/mean"), expected, rtol=2e-5, atol=2e-5)


def test_a_live_reference_is_loaded_once(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the policy."""
    from var.models.pretrained import Pretrained

    loaded, real = list[str](), Pretrained.load
    monkeypatch.setattr(Pretrained, "load", lambda self: (loaded.append(self.path), real(self))[1])
    fit(options, tmp_path / "run", "loss=dpo", "data.micro_batch=4", "reference=live", "trainer.max_steps=1")
    assert len(loaded) == 2


def test_rewards_that_weigh_are_told_to_be_negative_before_anything_trains(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *_: pytest.fail("trained"))
    for loss in ("wbc", "rgold", "rlol"):
        with pytest.raises(
            UserError, match=r"and \d+ of 39 are negative, the lowest -\d\.\d+ of row r\d+#\d; set reward"
        ):
            fit(options, tmp_path / "run", f"loss={loss}")


@pytest.mark.parametrize(
    ("loss", "positions", "what"), [("sft", 24, "sequence"), ("var", 36, "prompt with a response of its micro-batch")]
)
def test_rows_longer_than_a_models_positions_are_told_ahead(
    loss: str, positions: int, what: str, options: list[str], tmp_path: Path
) -> None:
    """The longest row has 30 tokens; one's prompt and another's answer have more, which cross scoring puts together."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4, n_positions=positions))
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(8):
            prompt, text = ("p" * 24, "a") if i % 2 else ("p", "a" * 24)
            row = {"id": f"r{i}", "prompt": prompt, "responses": [{"text": text, "score": i}]}
            file.write(json.dumps(row) + "\n")
    more = (
        f"model.path={saved(tmp_path / 'gpt2', model)}", f"data.path={path}", f"loss={loss}", "data.micro_batch=8",
        "reward.mismatch_gap=1.0",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=rf"gpt2 has {positions} positions, but the longest {what} has \d\d tokens. Lower"
    ):
        fit(options, tmp_path / "run", *more)
    assert not (tmp_path / "store" / "cross_logps").exists()


def test_an_online_run_needs_positions_for_its_prompts_and_answers_alone(options: list[str], tmp_path: Path) -> None:
    """data.max_length is a bound, above what the model has here; the longest prompt and its answer have some 20."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2(positions: int) -> Path:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4, n_positions=positions))
        return saved(tmp_path / f"gpt2-{positions}", model)

    options = [option for option in options if not option.startswith("reward")]
    more = (
        "loss=grpo", "reward=sentiment", "data.micro_batch=2", "data.global_batch=2", "trainer.max_steps=1",
        "generate.responses=2", "generate.max_new_tokens=4",
    )  # fmt: skip
    fit(options, tmp_path / "fits", *more, f"model.path={gpt2(64)}")
    with pytest.raises(
        UserError, match=r"gpt2 has 16 positions, but the longest prompt with its answer has \d\d tokens"
    ):
        fit(options, tmp_path / "short", *more, f"model.path={gpt2(16)}")


def test_single_answers_to_kto_are_told_of_its_threshold(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "single.jsonl"
    path.write_text("".join(
        json.dumps({"id": f"r{i}", "prompt": f"{i}?", "responses": [{"text": "yes", "score": i % 2}]}) + "\n"
        for i in range(8)
    ))  # fmt: skip
    more = (f"data.path={path}", "loss=kto", "data.micro_batch=4", "data.global_batch=4", "trainer.max_steps=1")
    with pytest.raises(UserError, match=r"no row has two: for single ones set loss\.threshold"):
        fit(options, tmp_path / "run", *more)
    run, _, _ = fit(options, tmp_path / "run", *more, "loss.threshold=0.5")
    assert run.data.facts["desirable sequences"] == 4


def test_the_rate_that_is_logged_is_the_one_of_the_step(options: list[str], tmp_path: Path) -> None:
    more = (
        "trainer.max_steps=4",
        "optim.schedule.kind=linear",
        "optim.schedule.warmup=0",
        "trainer.log_every_n_steps=1",
    )
    _, _, rows = fit(options, tmp_path / "run", *more)
    assert column(rows, "train/lr") == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])


def _start(run: Run) -> dict[str, torch.Tensor]:
    return dict(run.module().policy.state_dict())


class Killed(Exception):
    pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_is_straight(
    accumulate: int, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an epoch, the run goes on with the next rows of the plan: weights equal to the last
    bit, the curve without gap or double (Lightning #18780, accelerate PR #4238)."""
    from var.training.datamodule import AlignmentData

    seen: list[tuple[str, ...]] = []
    real = AlignmentData.batch

    def watched(self: AlignmentData, *arguments: Any) -> Any:
        batch = real(self, *arguments)
        seen.append(batch.ids)
        return batch

    monkeypatch.setattr(AlignmentData, "batch", watched)
    more = (
        "loss=var_grouped", "data.global_batch=4", f"data.micro_batch={4 // accumulate}", "trainer.epochs=3",
        "trainer.checkpoint_every_n_steps=4", "trainer.precision=32-true",
    )  # fmt: skip
    straight = fit(options, tmp_path / "straight", *more)
    order = list(seen)
    steps = straight[0].data.plan.steps
    seen.clear()
    kill_at = (steps + 6) * accumulate  # in the second epoch, two steps after a checkpoint

    def killing(self: AlignmentData, *arguments: Any) -> Any:
        if len(seen) == kill_at:
            raise Killed
        return watched(self, *arguments)

    monkeypatch.setattr(AlignmentData, "batch", killing)
    with pytest.raises(Killed):
        fit(options, tmp_path / "killed", *more)
    monkeypatch.setattr(AlignmentData, "batch", watched)
    before, seen[:] = list(seen), []
    resumed = fit(options, tmp_path / "killed", *more)
    last = (steps + 6) // 4 * 4 * accumulate
    assert before[:last] + seen == order
    assert all(torch.equal(straight[1][name], resumed[1][name]) for name in straight[1])
    assert column(resumed[2], "step") == column(straight[2], "step")
    assert column(resumed[2], "train/loss") == column(straight[2], "train/loss")


def test_resuming_with_other_data_is_refused(options: list[str], tmp_path: Path) -> None:
    """NVIDIA-NeMo/RL PR #2519: another data set would have its first rows skipped in silence."""
    more = ("trainer.checkpoint_every_n_steps=2", "data.micro_batch=4", "data.global_batch=4")
    fit(options, tmp_path / "run", *more, "trainer.max_steps=2")
    with pytest.raises(ValueError, match=r"the checkpoint was made with plan .* Resume with the same data"):
        fit(options, tmp_path / "run", *more, "data.limit=9")


def launch(processes: int, *arguments: str, script: str = "train.py", timeout: float | None = 300) -> None:
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *ranks, str(ROOT / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("strategy", "loss"), [("ddp", "var_grouped"), ("fsdp", "dpo")])
def test_ranks_give_one_curve(strategy: str, loss: str, options: list[str], tmp_path: Path) -> None:
    """Two processes over gloo, with a short last step in which one of them has no micro-batch, are one process."""
    common = [
        *options, f"loss={loss}", "data.micro_batch=2", "data.global_batch=4", "trainer.precision=32-true",
        "data.validation_prompts=2", "eval.sampling.responses=2", "eval.sampling.max_new_tokens=4",
    ]  # fmt: skip
    launch(1, *common, f"runs={tmp_path}/one")
    launch(2, *common, f"runs={tmp_path}/two", f"strategy={strategy}", "trainer.devices=2")
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    same_folders(one, two, "train/loss", "train/nll", "train/grad_norm")
    assert json.loads((two / "summary.json").read_text())["devices"] == 2


@pytest.mark.long
def test_a_mixture_of_experts_is_sharded_too(options: list[str], tmp_path: Path) -> None:
    """Its files name its weights otherwise than the model does, which is what fsdp reads them by."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=2, sliding_window=None)
    folder = saved(tmp_path / "mixture", spread(MixtralForCausalLM(config)))
    common = [
        *options,
        f"model.path={folder}",
        "trainer.precision=32-true",
        "trainer.max_steps=2",
        "data.micro_batch=2",
    ]
    launch(1, *common, f"runs={tmp_path}/one")
    launch(2, *common, f"runs={tmp_path}/two", "strategy=fsdp", "trainer.devices=2")
    same_folders(only(tmp_path / "one"), only(tmp_path / "two"), "train/loss", "train/grad_norm")


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy", [["ddp"], ["fsdp"], ["fsdp", "strategy.save_distributed_checkpoint=false"]], ids=" ".join
)
def test_two_ranks_resumed_are_straight(strategy: list[str], options: list[str], tmp_path: Path) -> None:
    """From a checkpoint in the middle of an epoch, sharded and in one file under FSDP2: the weights to the last bit,
    exported in one form."""
    common = [
        *options, "loss=var_grouped", "data.micro_batch=2", "data.global_batch=4", "trainer.precision=32-true",
        "trainer.checkpoint_every_n_steps=3", "optim.schedule.kind=constant", "optim.schedule.warmup=0",
        f"strategy={strategy[0]}", *strategy[1:], "trainer.devices=2",
    ]  # fmt: skip
    launch(2, *common, f"runs={tmp_path}/first", "trainer.max_steps=6")
    checkpoint = next((tmp_path / "first").glob("*/checkpoints/last.ckpt"))
    assert checkpoint.resolve().is_dir() == (strategy == ["fsdp"])
    launch(2, *common, f"runs={tmp_path}/resumed", f"resume={checkpoint}")
    launch(2, *common, f"runs={tmp_path}/straight")
    a, b = (load_file(next((tmp_path / n).glob("*/model/model.safetensors"))) for n in ("straight", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == load_file(Path(common[2].removeprefix("model.path=")) / "model.safetensors").keys()


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_other_ranks(before: int, after: int, options: list[str], tmp_path: Path) -> None:
    """From the middle of the second epoch, with the rows that come next."""
    common = [
        *options, "loss=var_grouped", "data.micro_batch=2", "data.global_batch=4", "model.dtype=float64",
        "trainer.epochs=3", "trainer.checkpoint_every_n_steps=3", "optim.schedule.kind=constant",
        "optim.schedule.warmup=0",
    ]  # fmt: skip

    def on(ranks: int) -> list[str]:
        return ["strategy=ddp", "trainer.devices=2"] if ranks == 2 else []

    launch(1, *common, f"runs={tmp_path}/straight")
    launch(before, *common, *on(before), f"runs={tmp_path}/first", "trainer.max_steps=14")
    checkpoint = next((tmp_path / "first").glob("*/checkpoints/last.ckpt")).resolve()
    launch(after, *common, *on(after), f"runs={tmp_path}/second", f"resume={checkpoint}")
    a, b = (load_file(next((tmp_path / n).glob("*/model/model.safetensors"))) for n in ("straight", "second"))
    assert_close(b, a, rtol=1e-6, atol=1e-7)
