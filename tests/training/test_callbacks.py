"""metrics.csv across a resume, exact means, warnings, the judge in validation, the plan file, and the schedule."""

import csv
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.runs import fit
from var.evaluate.answers import Answers, win_rate
from var.evaluate.judges.base import Judgement
from var.losses.base import Mean
from var.training.loggers import Curves, PlanFile
from var.training.metrics import Budget, PeakMemory, StepMetrics
from var.training.module import AlignmentModule
from var.training.schedule import Schedule
from var.training.validation import Validation, _judge_metrics, _with_error
from var.utils.errors import UserError
from var.utils.statistics import estimate_mean


def test_wrong_result_of_a_loss_is_explained():
    """One that returns only a number, and one that reads a field that it does not require."""
    batch: Any = SimpleNamespace(rewards=None)
    for loss, expected in (
        (lambda logps, batch: logps.sum(), "must return a tensor without dimensions and a dictionary of metrics"),
        (lambda logps, batch: (logps, {}), "which may be empty; it returned tuple"),
    ):
        with pytest.raises(UserError, match=expected):
            AlignmentModule._compute_loss(SimpleNamespace(loss=loss), torch.ones(2), batch)  # type: ignore[arg-type]
    module: Any = SimpleNamespace(loss=lambda logps, batch: (logps * batch.rewards[0], {}))
    with pytest.raises(TypeError, match="NoneType") as error:
        AlignmentModule._compute_loss(module, torch.ones(2), batch)
    assert "unless the loss lists it in `requires`" in error.value.__notes__[0]


def test_curves_take_new_columns_and_continue_after_a_resume(tmp_path):
    path = tmp_path / "metrics.csv"
    first = Curves(path, None)
    first.log_metrics({"loss": 3.0}, 1)
    first.log_metrics({"loss": 2.0, "reward": 0.5}, 2)
    first.log_metrics({"loss": 1.5}, 3)
    second = Curves(path, 2)  # the checkpoint was written at step 2
    second.log_metrics({"loss": 1.4}, 3)
    with path.open(newline="") as file:
        rows = [(row["step"], row["loss"], row["reward"]) for row in csv.DictReader(file)]
    assert rows == [("1", "3.0", ""), ("2", "2.0", "0.5"), ("3", "1.4", "")]
    Curves(path, None)
    assert not path.exists()


@pytest.mark.parametrize(
    ("health", "cause"),
    [
        ({"length_correlation": -0.6, "largest": 3.0}, "short responses get most of the weight"),
        ({"length_correlation": 0.0, "largest": 80.0}, "one response has 80 times the mean weight"),
        ({"length_correlation": 0.0, "largest": 9.0}, "raise loss.temperature"),
    ],
)
def test_low_effective_sample_size_is_reported_once_with_its_cause(health, cause, capsys):
    """The effective sample size is (Σw)²/Σw² over n. Weights 4, 0, 0, 0 have 1/4."""
    metrics = StepMetrics(ess_warning=0.3)
    data = SimpleNamespace(report=SimpleNamespace(weights=health), seconds=2.0)
    callbacks = [metrics, Budget(math.inf)]
    trainer: Any = SimpleNamespace(datamodule=data, loggers=[], current_epoch=0, world_size=1, callbacks=callbacks)
    module: Any = SimpleNamespace(log=lambda *_, **__: None, gradient_norm=None, skipped=0, rate=0.1)
    module.take_metrics = lambda: {"loss": 1.0, "weight/mean": 1.0, "weight/square": 4.0}
    metrics._log(trainer, module, 5)
    metrics._log(trainer, module, 6)
    printed = capsys.readouterr().out.replace("\n", " ")
    assert printed.count("effective sample size since the last log is 0.25") == 1
    assert cause in printed


@pytest.mark.parametrize(("limit", "total"), [([], "3 steps"), (["trainer.max_seconds=600"], "3 steps or 600 s")])
def test_training_prints_its_progress_without_a_terminal(
    limit: list[str], total: str, options: list[str], tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("var.training.metrics.PACE", 0.0)
    fit(options, tmp_path, "loss=sft", "trainer.max_steps=3", "trainer.log_every_n_steps=1", *limit)
    first, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Training: ")]
    assert first == f"Training: {total}"
    for step, line in enumerate(lines, 1):
        left = r"about 0:0\d:\d\d left"
        assert re.fullmatch(rf"Training: step {step} of {total}, loss \d+\.\d+, [\d,]+ tokens/s, {left}", line), line
    assert len(lines) == 3


SCHEDULE = Schedule(kind="cosine", warmup=0.2, floor=0.1)


def test_metrics_are_sums_over_counts_not_means_of_means():
    """huggingface/trl #2468: micro-batches of 1 and 3 tokens with a total NLL of 5 and 3 have mean (5 + 3)/4 = 2."""
    module = AlignmentModule(torch.nn.Linear(1, 1), lambda *_: None, [], lambda _: None, SCHEDULE)  # type: ignore[arg-type,return-value]
    for total, number in ((5.0, 1.0), (3.0, 3.0)):
        module.record({"nll": Mean(torch.tensor(total), number)})
    assert module.take_metrics() == {"nll": 2.0}
    assert not module._sums


def test_judge_counts_ties_half_in_the_curves_like_the_reward():
    """A win, two ties and a loss are one half by either. The judge's own win rate is a quarter."""
    after, before = np.array([[2.0], [1.0], [1.0], [0.0]]), np.array([[1.0], [1.0], [1.0], [1.0]])
    assert win_rate(after, before).mean() == 0.5
    assert _judge_metrics({"win_rate": 25.0, "mean_score": 0.5}) == {"validation/judge_win_rate": 0.5}
    assert _judge_metrics({"win_rate": None, "mean_score": None}) == _judge_metrics(None) == {}


@pytest.mark.parametrize("error", [UnicodeEncodeError("ascii", "ü", 0, 1, "x"), RecursionError("deep"), KeyError("a")])
def test_any_exception_of_a_judge_is_a_missing_number(error: Exception, capsys):
    def judge(pairs: Any, advance: Any) -> Any:
        raise error

    callback = Validation(None, None, None, judge, None, None, Path(), PeakMemory())  # type: ignore[arg-type]
    callback.before = answers = SimpleNamespace(texts=[["a"]])  # type: ignore[assignment]
    row = SimpleNamespace(id="1", prompt=(), answer=None)
    validation = SimpleNamespace(head=lambda limit: [row])
    data = SimpleNamespace(training_set=SimpleNamespace(validation=validation))
    assert callback._judge(SimpleNamespace(is_global_zero=True), data, answers) is None  # type: ignore[arg-type]
    assert f"the judge gave no verdict, training continues: {type(error).__name__}: " in capsys.readouterr().out


def test_judge_that_always_fails_is_reported_with_its_first_failure(capsys):
    rows: Any = [SimpleNamespace(id="a", prompt=(), answer=None)]
    validation = SimpleNamespace(head=lambda n: rows[:n])
    data: Any = SimpleNamespace(training_set=SimpleNamespace(validation=validation))
    answers = Answers([["x"]], [[[1]]], np.array([[True]]), np.array([[1]]), None)
    facts = {"max_errors": 0.05, "errors": {"failed": 2}, "first_failure": "400: no model"}
    judge: Any = lambda pairs, advance: Judgement(["error"], np.array([np.nan]), [], facts)  # noqa: E731
    callback = Validation(None, None, None, judge, None, None, Path(), PeakMemory())  # type: ignore[arg-type]
    callback.before = answers
    callback._judge(SimpleNamespace(is_global_zero=True), data, answers)  # type: ignore[arg-type]
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "no win rate by the judge: 1 of 1 pairs are in error" in printed
    assert "First failure: 400: no model" in printed


def test_single_prompt_has_no_standard_error_in_the_curves():
    assert _with_error("reward", estimate_mean(np.array([[1.0, 2.0]]))) == {"reward": 1.5}
    assert _with_error("reward", estimate_mean(np.array([[1.0], [2.0]]))) == {"reward": 1.5, "reward_se": 0.5}


def test_interrupted_write_keeps_the_previous_plan_file(tmp_path, monkeypatch):
    plan = SimpleNamespace(tokens=np.ones(1))
    training_set = SimpleNamespace(members=np.zeros((1, 1)), plan=plan, weights=None)
    data = SimpleNamespace(training_set=training_set, rows_of_members=np.zeros(1), records=lambda n: [])
    trainer: Any = SimpleNamespace(datamodule=data, is_global_zero=True)
    PlanFile(tmp_path).on_fit_start(trainer, None)  # type: ignore[arg-type]
    complete = (tmp_path / "plan.npz").read_bytes()
    assert sorted(np.load(tmp_path / "plan.npz")) == ["micro", "row", "tokens"]

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    plan.tokens = np.zeros(9)
    with pytest.raises(OSError, match="No space left"):
        PlanFile(tmp_path).on_fit_start(trainer, None)  # type: ignore[arg-type]
    assert (tmp_path / "plan.npz").read_bytes() == complete
    assert [path.name for path in tmp_path.iterdir() if path.name != "batches.jsonl"] == ["plan.npz"]


def test_schedule_by_hand():
    """10 steps, 2 of warm-up: 1/3, 2/3, then floor + (1 − floor)(1 + cos(π·k/8))/2, which at k = 4 is 0.55."""
    values = [SCHEDULE.factor(step, 10) for step in range(10)]
    assert values[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert values[6] == pytest.approx(0.55)
    assert SCHEDULE.factor(10, 10) == pytest.approx(0.1)
    linear = Schedule(kind="linear", warmup=0.0, floor=0.0)
    assert [linear.factor(step, 4) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert Schedule(kind="constant", warmup=0.5, floor=0.0).factor(9, 10) == 1.0
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        Schedule(kind="step", warmup=0.0, floor=0.0)  # type: ignore[arg-type]
