"""The memory model: compared with torch's own trackers on fake tensors, and what is chosen and advised from it."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from tests.helpers.cli import run
from tests.helpers.models import saved, tiny_model
from tests.helpers.runs import ROOT, composed, write_lines
from var.annotate.annotator import TOKENS
from var.config.schema import TrainerSettings
from var.models.frozen import cast_linear_weights
from var.models.logprobs import HEAD_CHUNK
from var.models.packing import Packed, pack
from var.models.policy import Policy
from var.models.sharding import gather_parameters, gather_weights, shard, use_sharded
from var.models.simulate import make_fake, measure_activations
from var.sampling.kv_cache import make_cache, reserve
from var.sampling.local import compute_last_hidden_states
from var.training.alternatives import plan_memory
from var.training.checks import choose_devices, count_accumulation
from var.training.memory import GIB, HEAD, MemoryModel, device_memory
from var.utils.errors import UserError

PLANNED = ["model=qwen2.5-7b", "loss=var", "trainer.device_memory=80GiB"]


def settings_of(cfg: Any) -> TrainerSettings:
    return choose_devices(cfg, TrainerSettings(**cfg.trainer))


@contextmanager
def pretended_ranks(world: int) -> Iterator[Any]:
    """Yield a mesh of ranks whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        distributed.destroy_process_group()


def make_policy(model: MemoryModel) -> tuple[Policy, FakeTensorMode]:
    """Return the run's policy on fake tensors."""
    own, fake = model.model, FakeTensorMode()
    if model.pretrained.gradient_checkpointing:
        own.gradient_checkpointing_enable()
    own.set_attn_implementation("packed")
    with fake:
        make_fake(own)
    return Policy(own.train()), fake


@contextmanager
def tracked(policy: Policy, fake: FakeTensorMode, world: int) -> Iterator[Any]:
    """Yield torch's memory tracker of a policy that is sharded over `world` ranks, with its optimizer."""
    with pretended_ranks(world) as mesh, fake, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if world > 1:
            shard(policy, mesh, torch.bfloat16, torch.device("cpu"))
        optimizer = torch.optim.AdamW(policy.parameters(), foreach=False)
        tracker: Any = MemTracker() if world == 1 else FSDPMemTracker(policy, optimizer)
        if world == 1:
            tracker.track_external(policy, optimizer)
        tracker.optimizer = optimizer
        with tracker:
            yield tracker


def restart(tracker: Any) -> None:
    """Let the tracker's peak begin with what is in use now."""
    tracker._peak_mem, tracker._peak_mem_snap = {}, {}
    tracker.reset_mod_stats()


def read_peak(tracker: Any) -> float:
    """Return the peak in bytes, without tensors on the meta device."""
    snapshot = tracker.get_tracker_snapshot("peak")
    return float(sum(parts["Total"] for device, parts in snapshot.items() if device.type != "meta"))


def train_step(policy: Policy, batch: Packed, tracker: Any) -> None:
    """Train on two micro-batches, without a step of the optimizer."""
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            logps = policy(batch)
        logps.sum().backward()
        del logps
        tracker.reset_mod_stats()


def track_training(model: MemoryModel, world: int) -> float:
    """Return the peak bytes of the second optimizer step, of two micro-batches, by torch's trackers."""
    length = model.cfg.data.max_length
    batch = pack([[0] * length] * model.sequences, [length - 600 // model.sequences] * model.sequences)
    policy, fake = make_policy(model)
    batch = batch._with(fake.from_tensor)
    with tracked(policy, fake, world) as tracker:
        train_step(policy, batch, tracker)
        tracker.optimizer.step()
        tracker.optimizer.zero_grad()
        restart(tracker)
        train_step(policy, batch, tracker)
    return read_peak(tracker)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 4, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "sizes",
    [
        ["model=qwen2.5-7b", "model.architecture.num_hidden_layers=3"],
        pytest.param(
            ["model=qwen2.5-7b", "model.architecture.num_hidden_layers=3", "model.architecture.vocab_size=1024"],
            marks=pytest.mark.long,
        ),
        pytest.param(["model=qwen2.5-7b"], marks=pytest.mark.long),
        pytest.param(["model=llama3.2-1b", "model.gradient_checkpointing=false"], marks=pytest.mark.long),
    ],
    ids=["three layers", "few words", "7B", "activations kept"],
)
def test_training_peaks_equal_torchs_trackers(sizes: list[str], world: int) -> None:
    """Within 10 % for one device, and for FSDP over 4 and 8."""
    cfg = composed(*sizes, "loss=var", "trainer.device_memory=80GiB", f"trainer.devices={world}")
    model = MemoryModel.of(cfg, settings_of(cfg))
    planned = sum(model.stages("fsdp" if world > 1 else "single", world)["training"].values())
    assert planned == pytest.approx(track_training(model, world), rel=0.1)


def make_reference(model: MemoryModel) -> Policy:
    """Return a frozen copy as `FrozenModel` has it, on fake tensors; a fake mode must be active."""
    own = model.pretrained.build_meta()
    own.set_attn_implementation("packed")
    cast_linear_weights(own, torch.bfloat16)
    make_fake(own)
    return Policy(own).eval()


def scoring_batch(model: MemoryModel) -> Packed:
    """Return the batch of a scoring pass. Only its last tokens are responses: the loop over them is slow."""
    length = model.cfg.data.max_length
    count = max(1, TOKENS // length)
    return pack([[0] * length] * count, [length - 600 // count] * count)


def score(policy: Policy, batch: Packed) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy(batch)


def track_annotation(model: MemoryModel, policy: Policy, batch: Packed, tracker: Any) -> None:
    """Score with the reference, on a device that has no policy yet."""
    score(make_reference(model), batch)


def track_sampling(model: MemoryModel, policy: Policy, batch: Packed, tracker: Any) -> None:
    """Encode the longest prompt, and sample two tokens of its responses."""
    sampling, length = model.cfg.eval.sampling, model.cfg.data.max_length
    cache, own = make_cache(), policy.model
    own.set_attn_implementation("sdpa")
    with use_sharded(policy, gather=True), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prompt = torch.zeros(1, length, dtype=torch.long)
        compute_last_hidden_states(own, prompt, None, torch.arange(length)[None], cache)
        reserve(cache, sampling["responses"], sampling["max_new_tokens"])
        token = torch.zeros(sampling["responses"], 1, dtype=torch.long)
        for step in range(2):
            tracker.reset_mod_stats()
            compute_last_hidden_states(own, token, None, token + length + step, cache)


def track_kl(model: MemoryModel, policy: Policy, batch: Packed, tracker: Any) -> None:
    """Score with the policy, whose outer parameters stay gathered, and then with the reference."""
    if isinstance(policy, FSDPModule):
        gather_parameters(policy, [policy])
    score(policy, batch)
    if isinstance(policy, FSDPModule):
        policy.set_reshard_after_forward(True, recurse=False)
        policy.reshard()
    score(make_reference(model), batch)


def track_export(model: MemoryModel, policy: Policy, batch: Packed, tracker: Any) -> None:
    """Gather one weight at a time. What the first rank copies to its host is not on the device."""
    gather_weights(policy.model, torch.bfloat16, first=False)


STAGES: dict[str, Any] = {
    "annotation, reference": track_annotation,
    "evaluation, sampling": track_sampling,
    "evaluation, KL": track_kl,
    "export": track_export,
}


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 4, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layers", [3, pytest.param(28, marks=pytest.mark.long)])
def test_peaks_of_other_stages_equal_torchs_trackers(layers: int, stage: str, world: int) -> None:
    """Within 10 %: annotation with the reference alone, the others next to the shards and the optimizer's state."""
    sizes = ["model=qwen2.5-7b", f"model.architecture.num_hidden_layers={layers}"]
    cfg = composed(*sizes, "loss=var", "trainer.device_memory=80GiB", f"trainer.devices={world}")
    model = MemoryModel.of(cfg, settings_of(cfg))
    parts = model.stages("fsdp" if world > 1 else "single", world)[stage]
    planned = sum(parts.values()) - parts.get(HEAD, 0.0)  # the trackers run on the CPU, which needs no such copy
    policy, fake = make_policy(model)
    small, batch = (part._with(fake.from_tensor) for part in (pack([[0] * 64], [32]), scoring_batch(model)))
    with tracked(policy, fake, world) as tracker:
        held = read_peak(tracker) if stage.startswith("annotation") else 0.0
        if not held:
            train_step(policy, small, tracker)
            tracker.optimizer.step()
            tracker.optimizer.zero_grad()
        restart(tracker)
        STAGES[stage](model, policy, batch, tracker)
    peak = read_peak(tracker) - held
    print(f"{stage}, {world} devices: measured {peak / GIB:.2f} GiB, planned {planned / GIB:.2f} GiB")
    assert peak == pytest.approx(planned, rel=0.1)


def test_parts_of_one_device_are_counts_times_widths() -> None:
    """Qwen2.5 7B has 7,615,616,512 parameters: 4 bytes each for weights and gradients, 8 for Adam's moments."""
    cfg = composed(*PLANNED, "trainer.devices=1")
    model = MemoryModel.of(cfg, settings_of(cfg))
    assert model.counts.total == 7_615_616_512
    stages = model.stages("single", 1)
    parts = stages["training"]
    assert parts["weights"] == parts["gradients"] == 4 * model.counts.total
    assert parts["optimizer"] == 8 * model.counts.total
    # 28 layers: q and o 3584², k and v 3584 × 512, and three matrices of 3584 × 18944
    linear = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert model.frozen == 2 * linear + 4 * (model.counts.total - linear)
    assert model.cache_per_token == 2 * 28 * 4 * 128 * 2


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("loss", "runs"), [("var", ["reference=live"]), ("grpo", [])])
def test_reference_that_runs_in_training_is_held_once_until_the_end(loss: str, runs: list[str], devices: int) -> None:
    """A cached one is loaded for the KL alone. Then the policy, which scores first, needs less than the reference."""
    words = ["model=llama3.2-1b", "trainer.device_memory=80GiB", f"trainer.devices={devices}"]
    stages = []
    for more in (["loss=var"], [f"loss={loss}", *runs]):
        cfg = composed(*words, *more)
        model = MemoryModel.of(cfg, settings_of(cfg))
        stages.append(model.stages("fsdp" if devices > 1 else "single", devices))
    cached, live = ({name: sum(parts.values()) for name, parts in way.items()} for way in stages)
    held = [name for name, parts in stages[1].items() if parts.get("reference") == model.frozen]
    assert held == [name for name in stages[1] if name != "annotation, reward model"]
    for name in ("evaluation, sampling", "evaluation, reward model", "export"):
        assert live[name] == pytest.approx(cached[name] + model.frozen)
    scores = stages[1]["evaluation, KL"]["weights to score with"]
    assert 0 < scores < model.frozen
    assert live["evaluation, KL"] == pytest.approx(cached["evaluation, KL"] + scores)
    if loss == "var":
        assert live["training"] == pytest.approx(cached["training"] + model.frozen)


def test_pass_of_a_live_reference_can_be_the_peak_of_a_step() -> None:
    """Micro-batches of one sequence of 64 tokens: the reference scores 4,096 tokens at once, if they are that many."""
    words = [
        "model=llama3.2-1b", "model.architecture.vocab_size=1024", "loss=dpo", "trainer.precision=32-true",
        "data.micro_batch=1", "data.max_length=64", "trainer.device_memory=80GiB",
    ]  # fmt: skip
    parts = []
    for reference in ("cached", "live"):
        cfg = composed(*words, f"reference={reference}")
        model = MemoryModel.of(cfg, settings_of(cfg))
        parts.append(model.stages("single", 1)["training"]["activations"])
    assert parts[1] == max(model.activations(train=False)) > parts[0]


@pytest.mark.parametrize(
    ("words", "strategy", "fits"),
    [
        (["model=qwen2.5-7b", "trainer.devices=1"], "single", False),
        (["model=qwen2.5-7b", "trainer.devices=4"], "fsdp", True),
        pytest.param(["model=qwen2.5-14b", "trainer.devices=8"], "fsdp", True, marks=pytest.mark.long),
        (["model=llama3.2-1b", "trainer.devices=4"], "ddp", True),
        pytest.param(["model=qwen2.5-7b", "adapter=lora", "trainer.devices=2"], "ddp", True, marks=pytest.mark.long),
        pytest.param(
            ["model=qwen2.5-32b-int4", "adapter=lora", "trainer.devices=2"], "ddp", True, marks=pytest.mark.long
        ),
        (["model=qwen2.5-7b", "strategy=ddp", "trainer.devices=4"], "ddp", False),
    ],
)
def test_strategy_keeps_a_replica_per_device_if_it_fits(words: list[str], strategy: str, fits: bool) -> None:
    cfg = composed(*PLANNED, *words)
    plan = plan_memory(cfg, settings_of(cfg))
    assert (plan.strategy, plan.fits) == (strategy, fits)


@pytest.mark.parametrize(("world", "turns"), [(1, 8), (2, 4), (3, 3), (4, 2), (6, 2), (8, 1)])
def test_a_step_has_the_same_batch_on_any_devices(world: int, turns: int) -> None:
    """8 micro-batches of 8: on 3 and 6 devices, the last turn has padding."""
    cfg = composed(*PLANNED, f"trainer.devices={world}")
    assert count_accumulation(cfg, settings_of(cfg)) == turns


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["trainer.devices=64"], "data.global_batch=512 or data.micro_batch=1 or trainer.devices=8."),
        (
            ["trainer.devices=8", "trainer.num_nodes=2"],
            "data.global_batch=128 or data.micro_batch=4 or trainer.devices=4.",
        ),
        (["data.micro_batch=7"], "data.global_batch=63 or data.global_batch=70 or data.micro_batch=8."),
        (["data.micro_batch=128"], "data.global_batch=128 or data.micro_batch=64."),
    ],
)
def test_error_names_the_nearest_batches_that_work(words: list[str], advice: str) -> None:
    """Each of them works."""
    cfg = composed(*PLANNED, *words)
    with pytest.raises(UserError, match=re.escape(advice)):
        count_accumulation(cfg, settings_of(cfg))
    for value in advice.removesuffix(".").split(" or "):
        other = composed(
            *PLANNED, *(word for word in words if word.partition("=")[0] != value.partition("=")[0]), value
        )
        count_accumulation(other, settings_of(other))


def test_devices_without_a_micro_batch_stay_idle(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """trainer.devices=auto on a machine with 8 GPUs, and the demo's single micro-batch per step."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    cfg = composed()
    assert settings_of(cfg).world == 1
    assert "1 of 8 GPUs are used, because an optimizer step has 1 micro-batches" in capsys.readouterr().out
    cfg = composed("model=qwen2.5-7b")
    assert settings_of(cfg).world == 8
    assert not capsys.readouterr().out


@pytest.mark.parametrize("size", ["80", "80 TB", "GiB", "eighty GiB"])
def test_device_memory_needs_a_unit(size: str) -> None:
    with pytest.raises(UserError, match=r"trainer.device_memory: expected a size such as 80GiB"):
        settings_of(composed(f"trainer.device_memory={size}"))


def test_device_memory_reads_both_units() -> None:
    sizes = [device_memory(settings_of(composed(f"trainer.device_memory={size}"))) for size in ("80GiB", "80GB")]
    assert sizes == [80 * GIB, 80e9]


def dry(folder: Path, *words: str) -> Any:
    places = [f"annotation_cache={folder}/store", f"cache={folder}/cache", f"runs={folder}/runs"]
    return run("train.py", *PLANNED, "debug=dry", *places, *words, HF_HUB_OFFLINE="1")


@pytest.mark.e2e
def test_the_literal_command_fits_on_four_cards(tmp_path: Path) -> None:
    """Without the hub: the paper's data and reward model, and what chose them."""
    done = dry(tmp_path, "trainer.devices=4")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Verdict: fits on 4 × 80 GiB with strategy=fsdp"), done.stdout
    for line in (
        "  model: qwen2.5-7b (command line)", "  data: offsetbias (conf/train.yaml)",
        "  reward: offsetbias-rm-8b (conf/train.yaml)", "  loss: var (command line)",
    ):  # fmt: skip
        assert line in lines
    assert any(line.startswith("  8,504 rows on the hub; about 528 optimizer steps in 2 epochs") for line in lines)
    for stage in ("annotation, reward model", "annotation, reference", "training", "evaluation, KL", "export"):
        assert any(line.startswith(f"  {stage}: ") for line in lines), stage


@pytest.mark.e2e
@pytest.mark.long
def test_every_alternative_passes_the_dry_run(tmp_path: Path) -> None:
    done = dry(tmp_path, "trainer.devices=1")
    assert done.returncode == 1
    assert done.stdout.startswith("Verdict: does not fit on 1 × 80 GiB")
    offered = re.findall(r"^  ([\w.]+=.*?)    # [\d.]+ GiB per device", done.stderr, re.M)
    assert len(offered) >= 3, done.stderr
    for words in offered:
        kept = ["trainer.devices=1"] if "trainer.devices" not in words else []
        again = dry(tmp_path, *kept, *words.split())
        assert again.returncode == 0, words + again.stdout + again.stderr
        assert again.stdout.startswith("Verdict: fits on ")


@pytest.mark.e2e
def test_choices_name_the_file_that_made_them(tiny_folder: Path, tmp_path: Path) -> None:
    """The demo model chooses its data, the data its lengths, an experiment its loss."""
    places = [f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", f"runs={tmp_path}/runs", "debug=dry"]
    printed = run("train.py", *places, f"model.path={tiny_folder}", HF_HUB_OFFLINE="1").stdout
    for line in (
        "model: smollm2-135m (conf/train.yaml)", "data: arithmetic (conf/model/smollm2-135m.yaml)",
        "reward: exact_number (conf/model/smollm2-135m.yaml)", "generate: demo (conf/data/arithmetic.yaml)",
    ):  # fmt: skip
        assert f"  {line}\n" in printed, printed
    (tokens,) = re.findall(r"^  micro-batches have at most ([\d,]+) tokens in 8 sequences$", printed, re.M)
    assert 8 * 20 < int(tokens.replace(",", "")) < 8 * 200  # of this data: data.max_length is 1024
    assert "  less, if responses are skipped for their rewards or weights" in printed
    assert "  rows: 224\n" in printed
    printed = run("train.py", *places, "experiment=table2", "strategy=auto", HF_HUB_OFFLINE="1").stdout
    assert "  model: qwen2.5-0.5b (conf/experiment/table2.yaml)\n" in printed
    assert "  loss: var (conf/experiment/table1.yaml)\n" in printed


def test_given_groups_have_priority() -> None:
    cfg = composed("model=qwen2.5-7b", "data=arithmetic")
    assert OmegaConf.select(cfg, "reward._target_").endswith("ExactNumber")
    assert cfg.generate.max_new_tokens == 20
    assert composed("data=arithmetic", "generate=default").generate.max_new_tokens == 512
    assert composed("model=qwen2.5-7b", "reward=sentiment").data.name == "offsetbias"


def measure_peak(command: list[str]) -> int:
    """Run a command; return the largest resident memory of its process, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, errors
    return usage.ru_maxrss * 1024


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_resident_memory_of_a_cpu_run_is_the_planned_one(checkpointing: str, tmp_path: Path) -> None:
    """100 million parameters in float32, compared with a run of a tiny model: 16 bytes each, and activations."""
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": "abc", "responses": ["defgh" * 60]} for _ in range(16)])
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}
    words = [
        "data=files", f"data.path={rows}", "reward=score", "loss=sft", "eval=off", "trainer.accelerator=cpu",
        "data.micro_batch=4", "data.global_batch=8", "data.validation_prompts=0", "trainer.max_steps=2",
        f"model.gradient_checkpointing={checkpointing}", "data.max_length=320",
    ]  # fmt: skip
    peaks = []
    for name, more in (("tiny", {}), ("large", sizes)):
        folder = saved(tmp_path / name, tiny_model(**more))
        places = [f"{key}={tmp_path}/{name}-{key}" for key in ("annotation_cache", "cache", "runs")]
        command = [sys.executable, str(ROOT / "train.py"), *words, *places, f"model.path={folder}"]
        peaks.append(measure_peak(command))
    cfg = composed(*words, f"model.path={tmp_path}/large")
    planned = sum(MemoryModel.of(cfg, settings_of(cfg)).stages("single", 1)["training"].values())
    print(f"measured {(peaks[1] - peaks[0]) / GIB:.2f} GiB, planned {planned / GIB:.2f} GiB")
    assert peaks[1] - peaks[0] == pytest.approx(planned, rel=0.25)  # a C heap does not return all memory


def test_model_that_cannot_be_simulated_has_an_estimate() -> None:
    """The experts of Mixtral are multiplied by an operation without a fake form for these dtypes."""
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=264, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    peaks = measure_activations(config, 2, 64, autocast=True)
    layer = 2 * 64 * 2 * (14 * 32 + 3 * 48 * 2)
    assert peaks.layers == 3 * layer
    assert peaks.head == 2 * layer + 4 * 264 * (3 * HEAD_CHUNK + 32)
