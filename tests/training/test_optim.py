"""MasterAdamW: AdamW's own steps on float32 copies, across a resume, and in training runs with bfloat16."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.cli import run
from tests.helpers.runs import composed, exported, run_folder
from var.config.schema import TrainerSettings
from var.training.memory import MemoryModel
from var.training.optim import MasterAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01}


def make_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).bfloat16().to(dtype)) for shape in ((7, 5), (5,))]


def draw_gradient(step: int, number: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def train_steps(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range, same: bool = False
) -> None:
    """Take steps with gradients that depend on the step, unless they are all the same."""
    for step in steps:
        optimizer.zero_grad()
        for number, parameter in enumerate(parameters):
            parameter.grad = draw_gradient(0 if same else step, number, parameter)
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_steps_on_float32_parameters_equal_adamw(fused, device):
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = MasterAdamW(ours, **OPTIONS, fused=fused, device=device)
    train_steps(optimizer, ours, range(20))
    train_steps(torch.optim.AdamW(theirs, **OPTIONS, fused=fused), theirs, range(20))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert all(a.data_ptr() != master.data_ptr() for master in optimizer.masters)


def test_bfloat16_parameters_are_rounded_float32_ones():
    """A step of 1e-4 is below the 2^-9 that changes a bfloat16 near 1, so without copies they hardly move."""
    ours, exact, alone = (make_parameters(dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16))
    optimizer, reference = MasterAdamW(ours, **OPTIONS), torch.optim.AdamW(exact, **OPTIONS)
    for step in range(30):
        for number, (a, b) in enumerate(zip(ours, exact, strict=True)):
            a.grad = draw_gradient(0, number, a)
            b.grad = a.grad.float()
        optimizer.step()
        reference.step()
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(ours, exact, strict=True)), step
    train_steps(torch.optim.AdamW(alone, **OPTIONS), alone, range(30), same=True)
    initial = make_parameters(torch.float32)
    distance, without_copies = (
        sum(float((a.detach().float() - s.detach()).abs().sum()) for a, s in zip(some, initial, strict=True))
        for some in (ours, alone)
    )
    assert without_copies < 0.5 * distance


def test_parameter_without_gradient_does_not_move():
    ours = make_parameters(torch.bfloat16)
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


def test_step_calls_a_closure():
    """Lightning computes the gradient inside `step`."""
    weight = make_parameters(torch.bfloat16)[0]
    optimizer = MasterAdamW([weight], **OPTIONS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = weight.float().square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(200)]
    assert losses[-1] < losses[0] - 0.5


def test_resumed_optimizer_continues_as_if_it_had_not_stopped():
    """The copies are part of the state. Rounded parameters could not restore them."""
    straight = make_parameters(torch.bfloat16)
    unbroken = MasterAdamW(straight, **OPTIONS)
    train_steps(unbroken, straight, range(30))

    first = make_parameters(torch.bfloat16)
    optimizer = MasterAdamW(first, **OPTIONS)
    train_steps(optimizer, first, range(11))
    state = copy.deepcopy(optimizer.state_dict())
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = MasterAdamW(second, **OPTIONS)
    assert any(not torch.equal(a, b) for a, b in zip(resumed.masters, state["masters"], strict=True))
    resumed.load_state_dict(state)
    train_steps(resumed, second, range(11, 30))
    for a, b in zip([*second, *resumed.masters], [*straight, *unbroken.masters], strict=True):
        assert torch.equal(a, b)


def test_schedule_sets_the_rate():
    ours = make_parameters(torch.float32)
    optimizer = MasterAdamW(ours, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train_steps(optimizer, ours, range(1))
    schedule.step()
    before = [p.detach().clone() for p in ours]
    train_steps(optimizer, ours, range(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.fixture
def train(tiny_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs train.py with this optimizer."""
    return lambda *options: run(
        "train.py", f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs", "data.source.problems=30", "data.validation_prompts=4", "reward=near_number",
        "loss=sft", "generate.max_new_tokens=40", "trainer.log_every_n_steps=1", "optim=adamw_masters", *options,
    )  # fmt: skip


def test_bfloat16_model_trains_and_is_exported_in_the_bases_dtype(train, tmp_path):
    done = train(
        "model.dtype=bfloat16",
        "trainer.checkpoint_every_n_steps=2",
        "trainer.max_steps=4",
        "trainer.keep_checkpoint=true",
    )
    assert done.returncode == 0, done.stderr
    weights = exported(tmp_path / "runs")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}  # that of the base's files
    checkpoint = run_folder(tmp_path / "runs") / "checkpoints" / "last.ckpt"
    masters = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["masters"]
    assert {master.dtype for master in masters} == {torch.float32}
    embedding = weights["model.embed_tokens.weight"]
    matching = [master for master in masters if master.shape == embedding.shape]
    assert any(torch.equal(master.bfloat16().float(), embedding) for master in matching)


@pytest.mark.parametrize(("options", "place"), [([], 0), (["optim.optimizer.device=cpu"], 1)])
def test_memory_model_counts_the_copies(options: list[str], place: int) -> None:
    """Two moments and a copy, 12 bytes per parameter, on the device or in host memory."""
    cfg = composed("model=qwen2.5-0.5b", "optim=adamw_masters", "model.dtype=bfloat16", *options)
    model = MemoryModel.of(cfg, TrainerSettings(**cfg.trainer))
    assert model.optimizer[place] == 12 * model.counts.total
    assert model.optimizer[1 - place] == 0


def test_sharded_parameters_are_rejected_before_sampling(train):
    done = train("strategy=fsdp")
    assert done.returncode == 1
    assert "optim: adamw_masters keeps complete copies, and fsdp shards float32 parameters" in done.stderr
    assert "Sampling" not in done.stdout
