"""How a run ends before its end, and that the same command then gives the unbroken run's weights to the last bit."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import column, composed, fit
from var.training import checkpoints as resuming
from var.training.checkpoints import checkpoints
from var.training.module import AlignmentModule
from var.training.run import Run
from var.training.validation import Validation
from var.utils.errors import UserError

MORE = (
    "loss=var_grouped", "data.global_batch=4", "data.micro_batch=2", "trainer.epochs=2", "trainer.precision=32-true",
    "trainer.checkpoint_every_n_steps=4",
)  # fmt: skip
JUDGED = ("data.validation_prompts=2", "eval.sampling.responses=2", "generate.max_new_tokens=4")


@pytest.fixture
def straight(options: list[str], tmp_path: Path) -> Callable[..., Any]:
    return lambda *more: fit(options, tmp_path / "straight", *MORE, *more)


def at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """`act` in the number-th call of a method, before it."""
    real, calls = getattr(owner, name), [0]

    def watched(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, watched)


def killed() -> None:
    raise KeyError("killed")


def equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert all(torch.equal(one[1][name], other[1][name]) for name in other[1])
    for name in ("step", "train/loss", "train/grad_norm", "validation/kl"):
        assert column(one[2], name) == column(other[2], name), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("call", [7, 8])
def test_told_to_leave_a_run_ends_with_the_step_that_runs(
    number: int,
    call: int,
    options: list[str],
    straight: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the first or second micro-batch of the fourth step (which is saved anyway) or of the third."""
    expected, before = straight(), signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_call(patch, AlignmentModule, "training_step", call - 2 * (number == signal.SIGUSR1),
                lambda: os.kill(os.getpid(), number))  # fmt: skip
        with pytest.raises(SystemExit) as left:
            fit(options, tmp_path / "run", *MORE)
    assert left.value.code == 128 + number
    step = 4 - (number == signal.SIGUSR1)
    assert f"Told to leave by {signal.Signals(number).name}: step {step} is saved" in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-{step}.ckpt"]
    assert signal.getsignal(number) == before
    equal(fit(options, tmp_path / "run", *MORE), expected)


def test_told_between_two_steps_a_run_leaves_at_once_and_makes_up_for_its_evaluation(
    options: list[str], straight: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (*JUDGED, "eval.every_n_steps=3")
    expected = straight(*more)
    with monkeypatch.context() as patch:
        at_call(patch, Validation, "_sample", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            fit(options, tmp_path / "run", *MORE, *more)
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].stem == "step-6"
    assert len(column(expected[2], "validation/kl")) == 6
    equal(fit(options, tmp_path / "run", *MORE, *more), expected)


def test_told_after_training_a_run_leaves_at_once(
    options: list[str], straight: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = straight(*JUDGED)
    with monkeypatch.context() as patch:
        at_call(patch, Validation, "_divergence", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as left:
            fit(options, tmp_path / "run", *MORE, *JUDGED)
    assert left.value.code == 143
    equal(fit(options, tmp_path / "run", *MORE, *JUDGED), expected)


@pytest.mark.parametrize("end", [[], ["trainer.max_steps=8"], ["trainer.max_steps=7"]])
def test_a_run_that_is_killed_after_training_evaluates_when_it_goes_on(
    end: list[str], options: list[str], straight: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without max_steps, at which Lightning's loop would return before its hooks."""
    expected = straight(*JUDGED, *end)
    with monkeypatch.context() as patch:
        at_call(patch, Validation, "on_train_end", 1, killed)
        with pytest.raises(KeyError):
            fit(options, tmp_path / "run", *MORE, *JUDGED, *end)
    with monkeypatch.context() as patch:
        patch.setattr(AlignmentModule, "training_step", lambda *_: pytest.fail("trained again"))
        again = fit(options, tmp_path / "run", *MORE, *JUDGED, *end)
    equal(again, expected)
    assert again[0].validation.result["after"] == expected[0].validation.result["after"]


def test_a_budget_counts_what_was_spent_before(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (*MORE, "trainer.max_seconds=0.001", "optim.schedule.kind=constant")
    with monkeypatch.context() as patch:
        at_call(patch, Validation, "on_train_end", 1, killed)
        with pytest.raises(KeyError):
            fit(options, tmp_path / "run", *more)
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].stem == "step-1"
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *_: pytest.fail("trained on"))
    fit(options, tmp_path / "run", *more)


@pytest.mark.parametrize("call", ["synchronise", "save"])
def test_a_full_disk_leaves_the_checkpoint_before_whole(
    call: str, options: list[str], straight: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected, folder = straight(), tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        owner = lightning.Trainer if call == "save" else resuming
        at_call(patch, owner, "save_checkpoint" if call == "save" else "synchronise", 3, full)
        with pytest.raises(
            UserError, match=r"step 12 cannot be written: No space left .* step-8\.ckpt is whole"
        ) as told:
            fit(options, tmp_path / "run", *MORE)
    assert "the same command goes on" in str(told.value)
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-8.ckpt"]
    assert (folder / "last.ckpt").resolve().name == "step-8.ckpt"
    equal(fit(options, tmp_path / "run", *MORE), expected)


def test_a_run_whose_end_has_no_room_is_told_before_it_samples(
    options: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(options, tmp_path / "whole", "trainer.max_steps=1", "trainer.precision=32-true")
    files = (tmp_path / "whole" / "checkpoints" / "step-1.ckpt", tiny_folder / "model.safetensors")
    written = sum(file.stat().st_size for file in files)

    def with_room(number: int) -> None:
        monkeypatch.setattr(resuming, "room", lambda _: number)

    with_room(int(written * 0.8))
    again = Run.compose(composed(*options, "trainer.precision=32-true"), tmp_path / "run")
    with pytest.raises(UserError, match=r"runs: .* has room for 0\.00 GiB, and the run ends with .* Make room, or set"):
        again.module()
    assert not any(again.annotator.computed.values())
    with_room(written)
    again.module()


def poisoned(monkeypatch: pytest.MonkeyPatch, call: int, where: str) -> None:
    """The loss, or its gradient alone, is not a number in one micro-batch."""
    real, calls = AlignmentModule.training_step, [0]

    def step(self: AlignmentModule, *arguments: Any) -> torch.Tensor:
        loss = real(self, *arguments)
        calls[0] += 1
        if calls[0] == call and where == "loss":
            loss = loss * float("nan")
            self._window[-1] = (self._window[-1][0], loss.detach())
            self.record({"loss": (loss.detach(), 1.0)})  # type: ignore[dict-item]
        elif calls[0] == call:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(AlignmentModule, "training_step", step)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_and_names_its_rows(
    where: str, options: list[str], straight: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = straight()
    micro = expected[0].data
    step = [share for share in micro.plan.batches(0, 0, 1)][10:12]
    names = [micro.batch(share).ids for share in step]
    with monkeypatch.context() as patch:
        poisoned(patch, 12, where)
        with pytest.raises(UserError, match="is not finite in optimiser step 6, rows") as told:
            fit(options, tmp_path / "run", *MORE)
    rows_told = str(told.value).split("rows ")[1].split(". The model")[0].split(", ")
    assert rows_told == list(names[1] if where == "loss" else (*names[0], *names[1]))
    assert [path.stem for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-4"]
    equal(fit(options, tmp_path / "run", *MORE), expected)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_can_be_left_out(
    where: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights stand still in that step, the others are as they would be; it is counted, across a resume too."""
    more = (*MORE, "trainer.nonfinite=skip", "trainer.log_every_n_steps=1", "trainer.max_steps=9")
    poisoned(monkeypatch, 6, where)
    states = list[dict[str, torch.Tensor]]()
    real = AlignmentModule.on_train_batch_end
    monkeypatch.setattr(
        AlignmentModule, "on_train_batch_end",
        lambda self, *a: (states.append({k: v.clone() for k, v in self.policy.state_dict().items()}), real(self, *a)),
    )  # fmt: skip
    _, weights, curve = fit(options, tmp_path / "run", *more)
    assert all(torch.equal(states[5][name], states[3][name]) for name in weights)  # step 3 is micro-batches 5 and 6
    assert not all(torch.equal(states[7][name], states[5][name]) for name in weights)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert "is not finite in optimiser step 3" in capsys.readouterr().out
    assert column(curve, "train/skipped") == [1.0] * 7
    assert len(column(curve, "train/loss")) == (8 if where == "loss" else 9)
    assert all(value == value for value in column(curve, "train/loss"))
    saved = torch.load(checkpoints(tmp_path / "run" / "checkpoints")[-1], weights_only=True)
    assert saved["skipped"] == 1


def test_clocks_and_hostnames_do_not_matter(
    options: list[str], straight: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed on one machine, gone on with on another, whose clock stands at the year 2000."""
    expected = straight()
    with monkeypatch.context() as patch:
        at_call(patch, AlignmentModule, "training_step", 14, killed)
        with pytest.raises(KeyError):
            fit(options, tmp_path / "run", *MORE)
    monkeypatch.setattr("time.time", lambda: 946_684_800.0)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    equal(fit(options, tmp_path / "run", *MORE), expected)


def test_a_tracker_out_of_reach_is_told_before_anything_runs(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    def unreachable(*_: Any) -> None:
        raise wandb.errors.CommError("Post https://api.example/graphql: connection refused")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(WandbLogger, "log_hyperparams", unreachable)
    with pytest.raises(UserError, match=r"logger\.wandb: the server does not answer .* logger\.wandb\.offline=true"):
        fit(options, tmp_path / "run", *MORE, "logger=wandb", "logger.wandb.offline=false")
    assert not list((tmp_path / "run").glob("checkpoints"))


def test_only_the_newest_checkpoint_is_kept_and_partial_ones_are_cleared(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-3.partial").mkdir(parents=True)
    fit(options, tmp_path / "run", *MORE, "trainer.max_steps=9")
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-9.ckpt"]
    assert os.readlink(folder / "last.ckpt") == "step-9.ckpt"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 9
