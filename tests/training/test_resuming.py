"""Runs that end early, by a signal, a kill, a full disk or a non-finite step, resume to the unbroken run's weights."""

import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from tests.helpers.runs import Killed, Result, assert_identical, column, composed, fit
from var.training import checkpoints as checkpoints_module
from var.training.checkpoints import checkpoints
from var.training.metrics import Budget
from var.training.module import AlignmentModule
from var.training.run import Run
from var.training.validation import Validation
from var.utils.errors import UserError

MORE = (
    "loss=var_grouped", "data.global_batch=4", "data.micro_batch=2", "trainer.epochs=2", "trainer.precision=32-true",
    "trainer.checkpoint_every_n_steps=4",
)  # fmt: skip
JUDGED = ("data.validation_prompts=2", "eval.sampling.responses=2", "generate.max_new_tokens=4")


class Runs:
    """Runs of one configuration: an unbroken one, and one that is interrupted and resumed."""

    def __init__(self, options: list[str], folder: Path) -> None:
        self.options, self.folder = options, folder
        self.saved = folder / "run" / "checkpoints"

    def straight(self, *more: str) -> Result:
        """Return the unbroken run."""
        return fit(self.options, self.folder / "straight", *MORE, *more)

    def run(self, *more: str) -> Result:
        """Start or resume the other run."""
        return fit(self.options, self.folder / "run", *MORE, *more)

    def steps(self) -> list[str]:
        """Return the names of its checkpoints."""
        return [path.stem for path in checkpoints(self.saved)]


@pytest.fixture
def runs(options: list[str], tmp_path: Path) -> Runs:
    return Runs(options, tmp_path)


@contextmanager
def interrupted(owner: Any, name: str, call: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` before the given call of a method."""
    real, calls = getattr(owner, name), [0]

    def watched(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            act()
        return real(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_resumed(resumed: Result, expected: Result) -> None:
    assert_identical(expected, resumed, "step", "train/loss", "train/grad_norm", "validation/kl")
    files = [run[0].folder / "evaluations.jsonl" for run in (resumed, expected)]
    assert len({file.read_text() if file.exists() else None for file in files}) == 1


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 4), (signal.SIGUSR1, 3), (signal.SIGINT, 3)])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_signal_ends_a_run_after_the_current_step(number, step, micro_batch, runs, capsys):
    """It arrives in either micro-batch of the fourth step, which is saved anyway, or of the third."""
    expected, before = runs.straight(), signal.getsignal(number)
    call = 2 * (step - 1) + micro_batch
    with (
        interrupted(AlignmentModule, "training_step", call, lambda: os.kill(os.getpid(), number)),
        pytest.raises(SystemExit) as stopped,
    ):
        runs.run()
    assert stopped.value.code == 128 + number
    assert f"Received {number.name}; saved step {step}." in capsys.readouterr().out
    assert runs.steps()[-1] == f"step-{step}"
    assert signal.getsignal(number) == before
    assert_resumed(runs.run(), expected)


def test_second_interrupt_ends_a_run_at_once(runs, capsys):
    """Nothing is saved after the first one, which waits for the end of the optimizer step."""

    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with (
        interrupted(AlignmentModule, "training_step", 3, interrupt_twice),
        pytest.raises((KeyboardInterrupt, SystemExit)),
    ):
        runs.run()
    assert "Interrupted: saving after this optimizer step. Ctrl-C again ends at once." in capsys.readouterr().out
    assert not runs.steps()


@pytest.mark.parametrize(
    ("method", "call", "step", "more"), [("_evaluate", 2, 6, ["eval.every_n_steps=3"]), ("_divergence", 1, 18, [])]
)
def test_signal_during_evaluation_ends_a_run_at_once(method, call, step, more, runs):
    """Between two steps or after training. The resumed run makes up for the evaluation."""
    expected = runs.straight(*JUDGED, *more)
    with interrupted(Validation, method, call, terminate), pytest.raises(SystemExit) as stopped:
        runs.run(*JUDGED, *more)
    assert stopped.value.code == 143
    assert runs.steps()[-1] == f"step-{step}"
    assert len(column(expected[2], "validation/kl")) == (6 if more else 1)
    last = [json.loads(line) for line in (expected[0].folder / "evaluations.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 18
    assert np.mean(last["kl"]) == pytest.approx(column(expected[2], "validation/kl")[-1])
    assert np.shape(last["kl"]) == np.shape(last["length"]) == (2, 2)
    assert last["reward"] is None  # the scores of the data cannot be computed for new answers
    assert_resumed(runs.run(*JUDGED, *more), expected)


def test_evaluated_step_is_not_evaluated_again_within_the_next_one(runs):
    """An evaluation after the first micro-batch of a step would drop the gradient of that micro-batch."""
    more = (*JUDGED, "eval.every_n_steps=4", "trainer.max_steps=6")
    expected = runs.straight(*more)
    with interrupted(AlignmentModule, "training_step", 11, kill), pytest.raises(Killed):
        runs.run(*more)
    assert runs.steps() == ["step-4"]
    resumed = runs.run(*more)
    assert_resumed(resumed, expected)
    assert column(resumed[2], "step") == column(expected[2], "step")


@pytest.mark.parametrize("end", [[], ["trainer.max_steps=8"], ["trainer.max_steps=7"]])
def test_run_killed_after_training_is_evaluated_when_it_resumes(end, runs, monkeypatch):
    """With max_steps too, at which Lightning's loop would return before its hooks."""
    more = (*JUDGED, *end)
    expected = runs.straight(*more)
    with interrupted(Validation, "on_train_end", 1, kill), pytest.raises(Killed):
        runs.run(*more)
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *_: pytest.fail("trained again"))
    again = runs.run(*more)
    assert_resumed(again, expected)
    assert again[0].validation.result["after"] == expected[0].validation.result["after"]


def test_budget_counts_seconds_spent_before_a_kill(runs, monkeypatch):
    more = ("trainer.max_seconds=0.001", "optim.schedule.kind=constant")
    with interrupted(Validation, "on_train_end", 1, kill), pytest.raises(Killed):
        runs.run(*more)
    assert runs.steps()[-1] == "step-1"
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *_: pytest.fail("trained on"))
    starts = list[float]()
    monkeypatch.setattr(Budget, "on_train_end", lambda budget, *_: starts.append(budget.earlier))
    runs.run(*more)
    assert starts[0] > 0.001


@pytest.mark.parametrize("call", ["synchronize", "save_checkpoint"])
def test_full_disk_keeps_the_previous_checkpoint(call, runs):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = runs.straight()
    owner = lightning.Trainer if call == "save_checkpoint" else checkpoints_module
    with (
        interrupted(owner, call, 3, full),
        pytest.raises(
            UserError, match=r"step 12 cannot be written: No space left .* step-8\.ckpt is complete"
        ) as error,
    ):
        runs.run()
    assert "run the same command to resume" in str(error.value)
    assert sorted(path.name for path in runs.saved.iterdir()) == ["last.ckpt", "step-8.ckpt", "step-8.sha256"]
    assert (runs.saved / "last.ckpt").resolve().name == "step-8.ckpt"
    assert_resumed(runs.run(), expected)


def test_too_little_disk_space_is_an_error_before_sampling(options, tiny_folder, tmp_path, monkeypatch, capsys):
    fit(options, tmp_path / "complete", "trainer.max_steps=1", "trainer.precision=32-true")
    files = (tmp_path / "complete" / "checkpoints" / "step-1.ckpt", tiny_folder / "model.safetensors")
    written = sum(file.stat().st_size for file in files)
    run = Run.compose(composed(*options, "trainer.precision=32-true"), tmp_path / "run")
    monkeypatch.setattr(checkpoints_module, "free_bytes", lambda _: int(written * 0.8))
    with pytest.raises(
        UserError, match=r"runs: .* has 0\.00 GiB free, and the run ends with .* Free disk space or set"
    ):
        run.module()
    assert not any(run.annotator.computed.values())
    monkeypatch.setattr(checkpoints_module, "free_bytes", lambda _: written)
    capsys.readouterr()
    run.module()
    assert "two checkpoints of 0.00 GiB do not fit." in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(checkpoints_module, "free_bytes", lambda _: 2 * files[0].stat().st_size)
    run.module()
    assert capsys.readouterr().out == ""


class KeepsBetas(torch.optim.SGD):
    """An optimizer of another package. torch's own turn lists into tuples, and some others keep what they are given."""

    def __init__(self, params: Any, lr: float, betas: Any, **_: Any) -> None:
        super().__init__([{"params": list(params), "betas": betas}], lr=lr)


def test_settings_of_the_optimizer_are_plain_values_in_a_checkpoint(options, tmp_path):
    """Not OmegaConf's lists, which torch does not load with weights_only=True."""
    optimizer = "optim.optimizer._target_=tests.training.test_resuming.KeepsBetas"
    fit(options, tmp_path, "trainer.max_steps=1", "trainer.precision=32-true", optimizer)
    state = torch.load(tmp_path / "checkpoints" / "step-1.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["betas"] == [0.9, 0.95]


def make_nonfinite(monkeypatch: pytest.MonkeyPatch, call: int, where: str) -> None:
    """Make the loss, or only its gradient, non-finite in one micro-batch."""
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
def test_nonfinite_step_is_an_error_with_its_rows(where, runs):
    expected = runs.straight()
    data = expected[0].data
    step = list(data.training_set.plan.batches(0, 0, 1))[10:12]
    names = [data.batch(micro_batch).ids for micro_batch in step]
    with pytest.MonkeyPatch.context() as patch:
        make_nonfinite(patch, 12, where)
        with pytest.raises(UserError, match="is not finite in optimizer step 6, rows") as error:
            runs.run()
    rows = str(error.value).split("rows ")[1].split(". Look at")[0].split(", ")
    assert rows == list(names[1] if where == "loss" else (*names[0], *names[1]))
    assert runs.steps() == ["step-4"]
    assert_resumed(runs.run(), expected)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_step_can_be_skipped(where, runs, monkeypatch, capsys):
    """The weights do not change in that step, and it is counted in metrics and checkpoints."""
    make_nonfinite(monkeypatch, 6, where)
    states, real = list[dict[str, torch.Tensor]](), AlignmentModule.on_train_batch_end
    monkeypatch.setattr(
        AlignmentModule, "on_train_batch_end",
        lambda self, *a: (states.append({k: v.clone() for k, v in self.policy.state_dict().items()}), real(self, *a)),
    )  # fmt: skip
    more = ("trainer.nonfinite=skip", "trainer.log_every_n_steps=1", "trainer.max_steps=9")
    _, weights, curve = runs.run(*more)
    assert all(torch.equal(states[5][name], states[3][name]) for name in weights)  # step 3 is micro-batches 5 and 6
    assert not all(torch.equal(states[7][name], states[5][name]) for name in weights)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert "is not finite in optimizer step 3" in capsys.readouterr().out
    assert column(curve, "train/skipped") == [1.0] * 7
    assert len(column(curve, "train/loss")) == (8 if where == "loss" else 9)
    assert all(value == value for value in column(curve, "train/loss"))
    assert torch.load(checkpoints(runs.saved)[-1], weights_only=True)["skipped"] == 1


def test_unreachable_tracker_is_an_error_before_training(runs, monkeypatch):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    def unreachable(*_: Any) -> None:
        raise wandb.errors.CommError("Post https://api.example/graphql: connection refused")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(WandbLogger, "log_hyperparams", unreachable)
    with pytest.raises(UserError, match=r"logger\.wandb: the server does not answer .* logger\.wandb\.offline=true"):
        runs.run("logger=wandb", "logger.wandb.offline=false")
    assert not runs.saved.exists()


def test_two_checkpoints_are_kept_and_partial_ones_are_removed(runs):
    (runs.saved / "step-3.ckpt.0.partial").mkdir(parents=True)
    (runs.saved / "step-2.sha256").touch()
    runs.run("trainer.max_steps=9")
    names = ["last.ckpt", "step-8.ckpt", "step-8.sha256", "step-9.ckpt", "step-9.sha256"]
    assert sorted(path.name for path in runs.saved.iterdir()) == names
    assert os.readlink(runs.saved / "last.ckpt") == "step-9.ckpt"
    assert torch.load(runs.saved / "last.ckpt", weights_only=True)["global_step"] == 9
    done = subprocess.run(["sha256sum", "-c", *runs.saved.glob("*.sha256")], cwd=runs.saved, capture_output=True)
    assert done.returncode == 0, done.stderr


def damage(path: Path, how: str) -> None:
    """Change a file: cut it, empty it, or flip one bit, in the middle of its numbers or near its end."""
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content.clear()
    else:
        content[len(content) // 2 if how == "bit" else -30] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "last bit", "cut", "empty", "checksums"])
def test_damaged_checkpoint_falls_back_to_the_one_before(how, runs, capsys):
    expected = runs.straight()
    with interrupted(AlignmentModule, "training_step", 19, kill), pytest.raises(Killed):
        runs.run()
    assert runs.steps() == ["step-4", "step-8"]
    if how == "checksums":
        damage(runs.saved / "step-8.sha256", "bit")
    else:
        damage(runs.saved / "step-8.ckpt", how)
    capsys.readouterr()
    with interrupted(AlignmentModule, "training_step", 9, kill), pytest.raises(Killed):
        runs.run()  # this attempt saves step 8 again
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "step-8.ckpt is not a checkpoint of a run: it is damaged" in printed
    assert "The run resumes from step-4.ckpt instead." in printed
    assert runs.steps() == ["step-4", "step-8"]
    assert_resumed(runs.run(), expected)


def test_only_damaged_checkpoints_are_an_error(runs):
    with interrupted(AlignmentModule, "training_step", 11, kill), pytest.raises(Killed):
        runs.run()
    damage(runs.saved / "step-4.ckpt", "bit")
    with pytest.raises(UserError, match=r"differ from step-4\.sha256.* No other checkpoint exists. Use resume=false"):
        runs.run()
    with pytest.raises(UserError, match=r"resume=.*step-4\.ckpt is not a checkpoint of a run: it is damaged"):
        runs.run(f"resume={runs.saved}/step-4.ckpt")


def test_checkpoint_without_checksums_resumes(runs):
    """Earlier versions wrote none."""
    expected = runs.straight()
    with interrupted(AlignmentModule, "training_step", 11, kill), pytest.raises(Killed):
        runs.run()
    (runs.saved / "step-4.sha256").unlink()
    assert_resumed(runs.run(), expected)


def test_older_checkpoint_is_removed_if_a_third_has_no_space(runs, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "free_bytes", lambda _: 1 << 40)
    monkeypatch.setattr(checkpoints_module, "check_disk_space", lambda *_: None)
    left = list[list[str]]()
    real = lightning.Trainer.save_checkpoint

    def save(self: Any, path: Any, *more: Any) -> None:
        left.append(runs.steps())
        real(self, path, *more)
        if len(left) == 2:
            monkeypatch.setattr(checkpoints_module, "free_bytes", lambda _: 10_000)

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", save)
    runs.run("trainer.max_steps=12")
    assert left == [[], ["step-4"], ["step-8"]]
    assert runs.steps() == ["step-12"]
