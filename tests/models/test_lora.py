"""Runs that train a LoRA adapter: with the adapter off, the weights are the reference; the export is what trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.helpers.cli import run as command
from tests.helpers.models import pretrained, saved, tiny_model
from tests.helpers.runs import assert_same, column, composed, find_scale, fit, launch, same_folders
from tests.helpers.runs import run_folder as only
from var.config.schema import TrainerSettings
from var.models.frozen import AdapterOff
from var.models.lora import LoRA, adapter_off, has_adapter
from var.models.packing import pack
from var.models.policy import Policy
from var.models.pretrained import Pretrained
from var.training.memory import GIB, MemoryModel
from var.training.run import Run
from var.utils.errors import UserError

pytest.importorskip("peft")
ADAPTER = ("adapter=lora", "adapter.r=4", "optim.optimizer.lr=1e-2")
MORE = ("data.global_batch=4", "data.micro_batch=2", "trainer.precision=32-true", *ADAPTER)
BATCH = pack([[256, 1, 2, 3, 4], [256, 5, 6, 7]], [2, 1])


@torch.no_grad()
def logps(model: Any) -> torch.Tensor:
    return Policy(model)(BATCH)


def lora(**more: Any) -> LoRA:
    return LoRA(**{"r": 4, "alpha": 8, "targets": "all-linear", "rslora": False, "merge": True, **more})


def attach(files: Pretrained, **more: Any) -> Any:
    """Load the model and attach an adapter to it."""
    return lora(**more).attach(files.load(), files.path, files.revision)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of all models that are loaded."""
    paths, load = list[str](), Pretrained.load
    monkeypatch.setattr(Pretrained, "load", lambda self: (paths.append(self.path), load(self))[1])
    return paths


def test_adapter_starts_at_its_base_and_can_be_turned_off(tiny_folder: Path, tmp_path: Path) -> None:
    files = pretrained(tiny_folder, tmp_path, dtype="bfloat16")
    model = attach(files)
    base = logps(files.load())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert has_adapter(model)
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.equal(logps(model), base)
    for parameter in trained.values():
        parameter.data.normal_(std=0.3)
    assert not torch.allclose(logps(model), base, atol=0.1)
    with adapter_off(model):
        assert torch.equal(logps(model), base)
    assert torch.equal(AdapterOff(Policy(model))(BATCH), base)
    states = AdapterOff(Policy(model)).prompt_states(BATCH)
    for found, expected in zip(states, Policy(files.load()).prompt_states(BATCH), strict=True):
        assert torch.equal(found, expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"targets": ["no_such_layer"]}, r"adapter\.targets=\['no_such_layer'\]"),
        ({"targets": ["q_proj", "embed_tokens"]}, "includes the embeddings or the head"),
    ],
)
def test_invalid_targets_are_rejected(more: dict[str, Any], what: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        attach(pretrained(tiny_folder, tmp_path), **more)


@pytest.mark.parametrize("more", [{"r": 0}, {"alpha": 0}])
def test_invalid_sizes_are_rejected(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="adapter: r must be at least 1 and alpha positive"):
        lora(**more)


@pytest.mark.parametrize("loss", ["dpo", "var", "kto"])
def test_cached_and_live_reference_give_one_curve_with_one_model(
    loss: str, options: list[str], tmp_path: Path, loaded: list[str]
) -> None:
    """In-batch weights of a live reference are the cached ones times a constant, to which AdamW is insensitive."""
    scale = ("optim.optimizer.eps=1e-30", "trainer.gradient_clip=0") if loss == "var" else ()
    more = (*MORE, *scale, f"loss={loss}", "trainer.epochs=2")
    stored = fit(options, tmp_path / "stored", *more)
    assert len(loaded) == 1  # it also computes the annotations that are not cached
    live = fit(options, tmp_path / "live", *more, "reference=live")
    assert len(loaded) == 2
    if loss == "var":
        find_scale(live, stored, "train/loss", rtol=1e-4)
    else:
        assert_same(live, stored, "train/loss", rtol=2e-5, atol=2e-5, weights=False)
    before = stored[0].pretrained.load().state_dict()
    for name, weight in before.items():
        after = stored[1].get(f"model.{name}", stored[1].get(f"model.{name.replace('.weight', '.base_layer.weight')}"))
        assert torch.equal(after, weight), name
    assert any(bool(weight.any()) for name, weight in stored[1].items() if "lora_B" in name)


@pytest.mark.parametrize("loss", ["grpo", "var_online", "ppo"])
def test_online_losses_use_the_same_weights_as_reference(
    loss: str, options: list[str], tmp_path: Path, loaded: list[str]
) -> None:
    online = [
        "data=arithmetic", "data.source.problems=12", "reward=near_number", "data.validation_prompts=2",
        "generate.max_new_tokens=6", "eval.sampling.responses=2", "trainer.precision=32-true", "data.global_batch=4",
        "data.micro_batch=2", "trainer.max_steps=2", "generate.responses=2", *ADAPTER,
    ]  # fmt: skip
    common = [o for o in options if not o.startswith(("data", "reward", "trainer.precision", "loss"))]
    run, _, curve = fit(common, tmp_path / "run", f"loss={loss}", *online)
    assert len(loaded) == 1
    assert run.validation.result["kl"]["mean"] != 0
    assert column(curve, "train/loss")


def test_adapter_resumes_from_a_checkpoint_without_its_base(options: list[str], tmp_path: Path) -> None:
    more = (*MORE, "loss=var_grouped", "trainer.checkpoint_every_n_steps=3", "optim.schedule.kind=constant",
            "optim.schedule.warmup=0")  # fmt: skip
    straight = fit(options, tmp_path / "straight", *more)
    fit(options, tmp_path / "run", *more, "trainer.max_steps=4")
    saved = tmp_path / "run" / "checkpoints" / "step-4.ckpt"
    names = torch.load(saved, weights_only=True)["state_dict"]
    assert all("lora_" in name for name in names)
    assert len(names) == 2 * 2 * 7
    resumed = fit(options, tmp_path / "run", *more)
    assert all(torch.equal(straight[1][name], resumed[1][name]) for name in straight[1])
    assert column(resumed[2], "train/loss") == column(straight[2], "train/loss")


def test_checkpoint_of_other_weights_is_rejected(options: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    more = (*MORE, "loss=sft", "trainer.max_steps=2")
    fit(options, tmp_path / "run", *more)
    other = saved(tmp_path / "other", tiny_model(seed=9))
    with pytest.raises(UserError, match=r"the checkpoint was made from weights \w+, and model\.path holds \w+"):
        fit(options, tmp_path / "run", *more, f"model.path={other}")


@pytest.fixture
def train(tiny_folder: Path, tmp_path: Path) -> Any:
    def run(*more: str) -> tuple[Any, Path]:
        done = command(
            "train.py", f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache",
            f"runs={tmp_path}/runs", "data.source.problems=30", "data.validation_prompts=4", "reward=near_number",
            "generate.max_new_tokens=40", "trainer.max_steps=3",
            "trainer.keep_checkpoint=true", *ADAPTER, *more,
        )  # fmt: skip
        return done, max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)

    return run


def test_exported_model_is_the_trained_one(train: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """Merged and as an adapter; init= reads both, with the same results."""
    done, merged = train("loss=sft")
    assert done.returncode == 0, done.stderr
    done, apart = train("loss=sft", "adapter.merge=false")
    assert done.returncode == 0, done.stderr
    assert not (merged / "model" / "adapter_config.json").exists()
    config = json.loads((apart / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder.resolve())
    assert "PeftModel" not in (merged / "model" / "README.md").read_text()
    a, b = (logps(pretrained(folder / "model", tmp_path).load()) for folder in (merged, apart))
    c = logps(pretrained(merged / "adapter", tmp_path).load())
    assert_close(a, b, rtol=0, atol=1e-5)
    assert_close(a, c, rtol=0, atol=1e-5)
    assert (a - logps(pretrained(tiny_folder, tmp_path).load())).abs().max() > 1e-3
    saved = torch.load(merged / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained = attach(pretrained(tiny_folder, tmp_path), alpha=32)
    missing = trained.load_state_dict({k.removeprefix("policy.model."): v for k, v in saved.items()}, strict=False)
    assert not missing.unexpected_keys
    assert_close(logps(trained), a, rtol=0, atol=1e-5)
    done, _ = train("loss=dpo", f"init={merged}", "trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    done, _ = train("loss=dpo", f"init={apart}", "adapter.merge=false")
    assert "is an adapter itself. Start from a model that was exported" in done.stderr


def test_reward_model_trains_with_an_adapter(options: list[str], tmp_path: Path) -> None:
    """All weights of its head train and are saved with it; reward=classifier reads every form to the same scores."""
    from var.rewards.classifier import Classifier

    more = [o for o in options if not o.startswith("trainer.precision")]
    done = command("train.py", *more, *MORE, "loss=bradley_terry", "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr
    (merged,) = (tmp_path / "runs").iterdir()
    head = load_file(merged / "model" / "model.safetensors")["score.weight"]
    assert bool(head.any())
    done = command("train.py", *more, *MORE, "loss=bradley_terry", "trainer.max_steps=3", "adapter.merge=false")
    assert done.returncode == 0, done.stderr
    (apart,) = set((tmp_path / "runs").iterdir()) - {merged}
    assert torch.equal(load_file(apart / "model" / "adapter_model.safetensors")["base_model.model.score.weight"], head)
    prompt = [{"role": "user", "content": "question 1?"}]
    rewards = [
        Classifier(path=str(path), cache=str(tmp_path / "cache")) for path in (merged, merged / "adapter", apart)
    ]
    first, second, third = (reward([prompt] * 2, ["abz", "a longer onez"], [None] * 2) for reward in rewards)
    assert len(set(first)) == 2
    assert second == third == pytest.approx(first, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_give_the_same_adapter(strategy: str, options: list[str], tmp_path: Path) -> None:
    common = [*options, *MORE, "loss=var_grouped", "data.validation_prompts=2", "eval.sampling.responses=2",
              "eval.sampling.max_new_tokens=4", "trainer.max_steps=4"]  # fmt: skip
    launch(1, *common, f"runs={tmp_path}/one")
    launch(2, *common, f"runs={tmp_path}/two", f"strategy={strategy}", "trainer.devices=2")
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert_close(b, a, rtol=1e-4, atol=1e-5)
    same_folders(one, two)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for quantization to 4 bits, which works on blocks of 64 weights."""
    return saved(tmp_path_factory.mktemp("wide"), tiny_model(hidden_size=128, intermediate_size=256))


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.5), ("fp4", 2.0), ("int8", 0.1)])
def test_quantized_model_is_another_reference(kind: str, most: float, wide_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain, files = pretrained(wide_folder, tmp_path), pretrained(wide_folder, tmp_path, quantization=kind)
    assert files.fingerprint == {**plain.fingerprint, "quantization": kind}
    apart = (logps(files.load()) - logps(plain.load())).abs()
    assert 1e-4 < float(apart.mean()) < most
    assert torch.equal(logps(attach(files)), logps(files.load()))


@pytest.mark.long
def test_adapter_trains_on_a_4_bit_model(train: Any, wide_folder: Path, tmp_path: Path) -> None:
    """Through annotation, training and evaluation. The adapter is merged into the unquantized weights."""
    pytest.importorskip("bitsandbytes")
    done, folder = train("loss=dpo", f"model.path={wide_folder}", "model.quantization=nf4")
    assert done.returncode == 0, done.stderr
    assert "No module named 'kernels'" not in done.stdout + done.stderr  # a warning of bitsandbytes at its import
    merged = load_file(folder / "model" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    base = load_file(wide_folder / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    (a,) = (v for k, v in adapter.items() if "layers.0.mlp.up_proj.lora_A" in k)
    (b,) = (v for k, v in adapter.items() if "layers.0.mlp.up_proj.lora_B" in k)
    name = "model.layers.0.mlp.up_proj.weight"
    assert_close(merged[name], base[name] + 8.0 * b @ a, rtol=1e-5, atol=1e-6)  # alpha 32 over r 4
    assert bool(b.any())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation"]["kl"]["mean"] != 0
    done, apart = train("loss=dpo", f"model.path={wide_folder}", "model.quantization=nf4", "adapter.merge=false")
    assert done.returncode == 0, done.stderr
    files = pretrained(apart / "model", tmp_path, quantization="nf4")
    model = attach(pretrained(wide_folder, tmp_path, quantization="nf4"), alpha=32)
    saved = torch.load(apart / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict({k.removeprefix("policy.model."): v for k, v in saved.items()}, strict=False)
    assert_close(logps(files.load()), logps(model), rtol=0, atol=1e-5)


def test_quantized_model_rejects_full_training_and_fsdp(wide_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    own = (
        f"model.path={wide_folder}", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs",
    )  # fmt: skip
    done = command("train.py", *own, "model.quantization=nf4", "strategy=fsdp")
    assert done.returncode == 1
    assert "nf4 weights are frozen; set adapter=lora to train on top of them" in done.stderr
    assert "fsdp does not shard quantized weights" in done.stderr
    done = command("train.py", *own, "model.quantization=int4", "adapter=lora")
    assert "expected nf4 or fp4 or int8 or null, got 'int4'" in done.stderr


@pytest.mark.long
def test_32b_in_4_bit_passes_the_dry_run(tmp_path: Path) -> None:
    """31.2 of 32.8 billion weights are in 4 bits, with a copy on each of 32 devices. Nothing is downloaded."""
    cfg = composed(
        "model=qwen2.5-32b-int4", "adapter=lora", "strategy=ddp", "loss=var", "dry=true", "data=offsetbias",
        "trainer.num_nodes=4", "trainer.devices=8", "data.micro_batch=4", "trainer.device_memory=48GiB",
        "data.global_batch=128", f"annotation_cache={tmp_path}",
    )  # fmt: skip
    plan = Run.compose(cfg, tmp_path).memory
    assert plan is not None
    assert plan.fits
    counts = MemoryModel.of(cfg, TrainerSettings(**cfg.trainer)).counts
    assert (counts.total - counts.trained, counts.trained) == (32_763_876_352, 134_217_728)
    assert 17.5 < plan.stages["training"]["weights"] / GIB < 19
