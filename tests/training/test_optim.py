"""MasterAdamW: AdamW's own steps on float32 copies, through resuming, the run's trainer and a parameter in bfloat16."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.cli import run
from var.training.optim import MasterAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).bfloat16().to(dtype)) for shape in ((7, 5), (5,))]


def gradient(step: int, number: int, like: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(like.shape, generator=draw).to(like.dtype)


def trained(optimizer: torch.optim.Optimizer, of: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        for number, parameter in enumerate(of):
            parameter.grad = gradient(step, number, parameter)
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_of_float32_parameters_it_is_adamw(fused: bool, device: Any) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = MasterAdamW(ours, **OPTIONS, fused=fused, device=device)
    trained(optimizer, ours, range(20))
    trained(torch.optim.AdamW(theirs, **OPTIONS, fused=fused), theirs, range(20))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert all(a.data_ptr() != master.data_ptr() for master in optimizer.masters)


def test_bfloat16_parameters_are_the_rounded_image_of_float32_ones() -> None:
    """Each step of 1e-4 is under the 2^-9 that moves a bfloat16 near 1: alone such parameters all but stand still."""
    ours, exact, alone = parameters(torch.bfloat16), parameters(torch.float32), parameters(torch.bfloat16)
    optimizer = MasterAdamW(ours, **OPTIONS)
    reference = torch.optim.AdamW(exact, **OPTIONS)
    for step in range(30):
        for number, (a, b) in enumerate(zip(ours, exact, strict=True)):
            a.grad = gradient(0, number, a)
            b.grad = a.grad.float()
        optimizer.step()
        reference.step()
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(ours, exact, strict=True)), step
    plain = torch.optim.AdamW(alone, **OPTIONS)
    for _ in range(30):
        for number, parameter in enumerate(alone):
            parameter.grad = gradient(0, number, parameter)
        plain.step()
    start = parameters(torch.float32)
    moved, stood = (
        sum(float((a.detach().float() - s.detach()).abs().sum()) for a, s in zip(some, start, strict=True))
        for some in (ours, alone)
    )
    assert stood < 0.5 * moved


def test_a_parameter_without_gradient_stands_still() -> None:
    ours = parameters(torch.bfloat16)
    before = [p.detach().clone() for p in ours]
    optimizer = MasterAdamW(ours, lr=0.1)
    ours[0].grad = torch.ones_like(ours[0])
    optimizer.step()
    assert not torch.equal(ours[0], before[0])
    assert torch.equal(ours[1], before[1])
    optimizer.zero_grad(set_to_none=False)
    assert ours[0].grad is not None
    assert not ours[0].grad.any()
    optimizer.zero_grad()
    assert ours[0].grad is None


def test_it_steps_with_a_closure() -> None:
    """As Lightning calls it: the gradient is computed inside `step`."""
    (weight,) = parameters(torch.bfloat16)[:1]
    optimizer = MasterAdamW([weight], **OPTIONS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = weight.float().square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(200)]
    assert losses[-1] < losses[0] - 0.5


def test_it_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    """The copies are part of the state: read from the rounded parameters they would be others."""
    straight = parameters(torch.bfloat16)
    whole = MasterAdamW(straight, **OPTIONS)
    trained(whole, straight, range(30))

    first = parameters(torch.bfloat16)
    optimizer = MasterAdamW(first, **OPTIONS)
    trained(optimizer, first, range(11))
    state = copy.deepcopy(optimizer.state_dict())
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = MasterAdamW(second, **OPTIONS)
    assert any(not torch.equal(a, b) for a, b in zip(resumed.masters, state["masters"], strict=True))
    resumed.load_state_dict(state)
    trained(resumed, second, range(11, 30))
    for a, b in zip([*second, *resumed.masters], [*straight, *whole.masters], strict=True):
        assert torch.equal(a, b)


def test_a_schedule_sets_its_rate() -> None:
    ours = parameters(torch.float32)
    optimizer = MasterAdamW(ours, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    trained(optimizer, ours, range(1))
    schedule.step()
    before = [p.detach().clone() for p in ours]
    trained(optimizer, ours, range(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.fixture
def train(tiny_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    return lambda *options: run(
        "train.py", f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs", "data.source.problems=30", "data.validation_prompts=4", "reward=near_number",
        "loss=sft", "generate.max_new_tokens=40", "trainer.log_every_n_steps=1", "optim=adamw_masters", *options,
    )  # fmt: skip


def test_a_bfloat16_model_trains_and_is_exported_so(train: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    done = train("model.dtype=bfloat16", "trainer.checkpoint_every_n_steps=2", "trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    weights = load_file(folder / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {master.dtype for master in saved["masters"]} == {torch.float32}
    embedding = weights["model.embed_tokens.weight"]
    matching = [master for master in saved["masters"] if master.shape == embedding.shape]
    assert any(torch.equal(master.bfloat16(), embedding) for master in matching)


def test_the_dry_run_counts_the_copies(train: Callable[..., Any]) -> None:
    for options, line in (
        (["model.dtype=bfloat16"], "optimiser (two moments and float32 copies)"),
        (["model.dtype=bfloat16", "optim.optimizer.device=cpu"], "optimiser (two moments and float32 copies), host"),
    ):
        done = train("debug=dry", *options)
        assert done.returncode == 0, done.stderr
        assert f"{line}: " in done.stdout
        assert "Disk at the run's end: a checkpoint of 0.00 GiB, " in done.stdout


def test_sharded_parameters_are_refused_before_anything_is_sampled(train: Callable[..., Any]) -> None:
    done = train("strategy=fsdp")
    assert done.returncode == 1
    assert "optim: adamw_masters keeps whole copies, and here parameters are float32 shards" in done.stderr
    assert "Sampling" not in done.stdout
