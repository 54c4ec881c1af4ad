"""Ways of running that must give the same curve: accumulation, ranks, cached and live, resumed and unbroken."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from notebooks.tiny import SIZES
from tests.helpers.models import saved, spread, tiny_gpt2
from tests.helpers.runs import (
    Result,
    assert_identical,
    assert_same,
    column,
    exported,
    find_scale,
    fit,
    kill_and_resume,
    launch,
    run_folder,
    same_folders,
    write_lines,
)
from var.training.datamodule import AlignmentData
from var.training.module import AlignmentModule
from var.utils.errors import UserError

pytestmark = pytest.mark.trajectory


@pytest.mark.parametrize(
    ("loss", "more", "steps"),
    [("sft", [], 5), ("var_grouped", [], 5), ("dpo", [], 2), ("sft", ["data.limit=2", "trainer.epochs=3"], 1)],
)
def test_accumulation_gives_the_same_curve(loss, more, steps, options, tmp_path):
    """1×8, 2×4, 8×1, in the short last step too: 39 responses are four steps of 8 and one of 7.

    In an epoch shorter than a step, accumulation is not ignored and the divisor is not that of a full step. See
    huggingface/trl #2175 and Lightning-AI/pytorch-lightning #20350, #19987 and #21808.
    """
    one, *others = (
        fit(options, tmp_path / str(b), f"loss={loss}", "data.global_batch=8", f"data.micro_batch={b}", *more)
        for b in (8, 4, 1)
    )  # fmt: skip
    for other in others:
        assert other[0].data.training_set.plan.steps == one[0].data.training_set.plan.steps == steps
        assert_same(other, one)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_cached_and_live_reference_give_the_same_curve(loss, options, tmp_path):
    """The reference in each step and its cached float32 numbers differ only by rounding.

    In-batch weights differ by a constant too (test_live.py). KTO has its own and its mismatched pairs: 26 responses in
    micro-batches of 4, with a short one of 2.
    """
    more = (
        f"loss={loss}", "data.micro_batch=4", "data.global_batch=8", "trainer.precision=32-true", "trainer.epochs=3",
    )  # fmt: skip
    cached = fit(options, tmp_path / "cached", *more)
    live = fit(options, tmp_path / "live", *more, "reference=live")
    assert_same(live, cached, "train/loss", rtol=2e-5, atol=2e-5, weights=False)
    if loss == "kto":
        assert max(column(cached[2], "train/kl")) > 1e-3  # the reference point has an effect
        assert_same(live, cached, "train/kl", "train/grad_norm", rtol=2e-5, atol=2e-5, weights=False)
    initial = cached[0].module().policy.state_dict()
    change = max(float((cached[1][name] - initial[name]).abs().max()) for name in initial)
    difference = max(float((cached[1][name] - live[1][name]).abs().max()) for name in initial)
    assert difference < 0.02 * change


def test_live_weights_stay_those_of_the_cache_if_others_vanish(options, tmp_path):
    """With summed log π_ref, a response of 900 characters has the weight 0 next to one of 4.

    A live weight is the cached one times a constant.
    """
    path = write_lines(tmp_path / "long.jsonl", (
        {"id": f"r{i}", "prompt": "?", "responses": [{"text": "ab" * (2 if i % 2 else 450), "score": i % 3}]}
        for i in range(8)
    ))  # fmt: skip
    more = (
        f"data.path={path}", "loss=var_sum", "data.micro_batch=2", "data.global_batch=4", "data.seed=2",
        "trainer.epochs=1", "data.max_length=1024", "loss.temperature_unit=reward",
    )  # fmt: skip
    cached, live = (fit(options, tmp_path / name, *more, f"reference={name}") for name in ("cached", "live"))
    assert max(column(cached[2], "train/weight/mean")) > 0.5
    find_scale(live, cached, "train/weight/mean", rtol=2e-5)


def test_live_reference_is_loaded_once(options, tmp_path, monkeypatch):
    """Policy and reference: two models in all."""
    from var.models.pretrained import Pretrained

    loaded, real = list[str](), Pretrained.load
    monkeypatch.setattr(Pretrained, "load", lambda self: (loaded.append(self.path), real(self))[1])
    fit(options, tmp_path / "run", "loss=dpo", "data.micro_batch=4", "reference=live", "trainer.max_steps=1")
    assert len(loaded) == 2


@pytest.mark.parametrize("loss", ["wbc", "rgold", "rlol"])
def test_negative_rewards_as_weights_are_an_error_before_training(loss, options, tmp_path, monkeypatch):
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"and \d+ of 39 are negative, the lowest -\d\.\d+ in row r\d+#\d\. Set reward"):
        fit(options, tmp_path / "run", f"loss={loss}")


@pytest.mark.parametrize(
    ("loss", "positions", "what"), [("sft", 24, "sequence"), ("var", 36, "prompt with a response of its micro-batch")]
)
def test_rows_longer_than_the_models_positions_are_an_error(loss, positions, what, options, tmp_path):
    """The longest row has 30 tokens. Cross scoring pairs long prompts with long responses, which are longer."""
    long, short = ("p" * 24, "a"), ("p", "a" * 24)
    path = write_lines(tmp_path / "rows.jsonl", (
        {"id": f"r{i}", "prompt": prompt, "responses": [{"text": text, "score": i}]}
        for i, (prompt, text) in enumerate([short, long] * 4)
    ))  # fmt: skip
    more = (
        f"model.path={saved(tmp_path / 'gpt2', tiny_gpt2(positions))}", f"data.path={path}", f"loss={loss}",
        "data.micro_batch=8", "reward.mismatch_gap=1.0",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=rf"gpt2 has {positions} positions, but the longest {what} has \d\d tokens. Lower"
    ):
        fit(options, tmp_path / "run", *more)
    assert not (tmp_path / "store" / "cross_logps").exists()


def test_online_run_needs_positions_only_for_its_prompts_and_responses(options, tmp_path):
    """data.max_length exceeds the model's positions here. The longest prompt with its response has about 20 tokens."""
    options = [option for option in options if not option.startswith("reward")]
    more = (
        "loss=grpo", "reward=sentiment", "data.micro_batch=2", "data.global_batch=2", "trainer.max_steps=1",
        "generate.responses=2", "generate.max_new_tokens=4",
    )  # fmt: skip
    enough, few = (saved(tmp_path / f"gpt2-{positions}", tiny_gpt2(positions)) for positions in (64, 16))
    fit(options, tmp_path / "fits", *more, f"model.path={enough}")
    with pytest.raises(
        UserError, match=r"gpt2 has 16 positions, but the longest prompt with its response has \d\d tokens"
    ):
        fit(options, tmp_path / "short", *more, f"model.path={few}")


def test_kto_on_single_responses_needs_a_threshold(options, tmp_path):
    path = write_lines(tmp_path / "single.jsonl", (
        {"id": f"r{i}", "prompt": f"{i}?", "responses": [{"text": "yes", "score": i % 2}]} for i in range(8)
    ))  # fmt: skip
    more = (f"data.path={path}", "loss=kto", "data.micro_batch=4", "data.global_batch=4", "trainer.max_steps=1")
    with pytest.raises(UserError, match=r"no row has two responses.* For single responses set loss\.threshold"):
        fit(options, tmp_path / "run", *more)
    run, _, _ = fit(options, tmp_path / "run", *more, "loss.threshold=0.5")
    assert run.data.report.desirable_sequences == 4


def test_logged_learning_rate_is_that_of_the_step(options, tmp_path):
    more = ("trainer.max_steps=4", "optim.schedule.kind=linear", "optim.schedule.warmup=0")
    _, _, curve = fit(options, tmp_path / "run", *more)
    assert column(curve, "train/lr") == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_equals_the_unbroken_one(accumulate, options, tmp_path):
    """Killed within an epoch, a run resumes with the next rows of the plan, whatever the clock and the host name.

    Weights are equal to the last bit, and the curve has no gap and no duplicates (Lightning #18780, accelerate #4238).
    """
    more = (
        "loss=var_grouped", "data.global_batch=4", f"data.micro_batch={4 // accumulate}", "trainer.epochs=3",
        "trainer.checkpoint_every_n_steps=4", "trainer.precision=32-true",
    )  # fmt: skip

    def second_epoch(straight: Result) -> int:
        """Return the call that is two steps after a checkpoint."""
        return (straight[0].data.training_set.plan.steps + 6) * accumulate

    straight, resumed, order, before, after = kill_and_resume(
        AlignmentData, "batch", lambda batch: batch.ids, second_epoch, options, tmp_path, *more
    )
    saved_at = second_epoch(straight) // accumulate // 4 * 4 * accumulate
    assert before[:saved_at] + after == order
    assert_identical(straight, resumed, "step", "train/loss")


def test_resuming_with_other_data_is_an_error(options, tmp_path):
    """Otherwise the first rows of the other data would be skipped silently (NVIDIA-NeMo/RL #2519)."""
    more = ("trainer.checkpoint_every_n_steps=2", "data.micro_batch=4", "data.global_batch=4")
    fit(options, tmp_path / "run", *more, "trainer.max_steps=2")
    with pytest.raises(UserError, match=r"these settings cannot differ .*\n  data\.limit: null → 9;"):
        fit(options, tmp_path / "run", *more, "data.limit=9")


# --- several processes

TWO_RANKS = "trainer.devices=2"
CONSTANT = ("optim.schedule.kind=constant", "optim.schedule.warmup=0")


@pytest.mark.parametrize(("strategy", "loss"), [("ddp", "var_grouped"), ("fsdp", "dpo")])
def test_ranks_give_the_same_curve(strategy, loss, options, tmp_path):
    """Two processes with gloo equal one. In a short last step one of them has no micro-batch."""
    common = [
        *options, f"loss={loss}", "data.micro_batch=2", "data.global_batch=4", "trainer.precision=32-true",
        "data.validation_prompts=2", "eval.sampling.responses=2", "eval.sampling.max_new_tokens=4",
    ]  # fmt: skip
    launch(1, *common, f"runs={tmp_path}/one")
    launch(2, *common, f"runs={tmp_path}/two", f"strategy={strategy}", TWO_RANKS)
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    same_folders(one, two, "train/loss", "train/nll", "train/grad_norm")
    assert json.loads((two / "summary.json").read_text())["devices"] == 2


@pytest.mark.long
def test_mixture_of_experts_can_be_sharded(options, tmp_path):
    """Its files use other weight names than the model, and fsdp reads weights by name."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=2, sliding_window=None)
    folder = saved(tmp_path / "mixture", spread(MixtralForCausalLM(config)))
    common = [
        *options, f"model.path={folder}", "trainer.precision=32-true", "trainer.max_steps=2", "data.micro_batch=2",
    ]  # fmt: skip
    launch(1, *common, f"runs={tmp_path}/one")
    launch(2, *common, f"runs={tmp_path}/two", "strategy=fsdp", TWO_RANKS)
    same_folders(run_folder(tmp_path / "one"), run_folder(tmp_path / "two"), "train/loss", "train/grad_norm")


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy", [["ddp"], ["fsdp"], ["fsdp", "strategy.save_distributed_checkpoint=false"]], ids=" ".join
)
def test_two_resumed_ranks_equal_two_unbroken_ones(strategy, options, tiny_folder, tmp_path):
    """They resume within an epoch, from a sharded checkpoint or, under FSDP2 too, from one file.

    Weights are equal to the last bit and are exported under the model's own names.
    """
    common = [
        *options, "loss=var_grouped", "data.micro_batch=2", "data.global_batch=4", "trainer.precision=32-true",
        "trainer.checkpoint_every_n_steps=3", *CONSTANT, f"strategy={strategy[0]}", *strategy[1:], TWO_RANKS,
    ]  # fmt: skip
    launch(2, *common, f"runs={tmp_path}/first", "trainer.max_steps=6", "trainer.keep_checkpoint=true")
    checkpoint = run_folder(tmp_path / "first") / "checkpoints" / "last.ckpt"
    assert checkpoint.resolve().is_dir() == (strategy == ["fsdp"])
    launch(2, *common, f"runs={tmp_path}/resumed", f"resume={checkpoint}")
    launch(2, *common, f"runs={tmp_path}/straight")
    a, b = (exported(tmp_path / name) for name in ("straight", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == load_file(tiny_folder / "model.safetensors").keys()


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_run_resumes_with_another_number_of_ranks(before, after, options, tmp_path):
    """From the middle of the second epoch, with the next rows."""
    common = [
        *options, "loss=var_grouped", "data.micro_batch=2", "data.global_batch=4", "model.dtype=float64",
        "trainer.epochs=3", "trainer.checkpoint_every_n_steps=3", *CONSTANT,
    ]  # fmt: skip
    ranks = {1: [], 2: ["strategy=ddp", TWO_RANKS]}
    launch(1, *common, f"runs={tmp_path}/straight")
    launch(
        before,
        *common,
        *ranks[before],
        f"runs={tmp_path}/first",
        "trainer.max_steps=14",
        "trainer.keep_checkpoint=true",
    )
    checkpoint = (run_folder(tmp_path / "first") / "checkpoints" / "last.ckpt").resolve()
    launch(after, *common, *ranks[after], f"runs={tmp_path}/second", f"resume={checkpoint}")
    assert_close(exported(tmp_path / "second"), exported(tmp_path / "straight"), rtol=1e-6, atol=1e-7)
