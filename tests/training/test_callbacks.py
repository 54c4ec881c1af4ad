"""metrics.csv over a resume, the warning on weights, and metrics that are exact means."""

import csv
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from var.evaluate.answers import Answers, win_rate
from var.evaluate.judges.base import Judgement
from var.losses.base import Mean
from var.training.loggers import Curves, PlanFile, _with_error
from var.training.metrics import StepMetrics
from var.training.module import AlignmentModule
from var.training.schedule import Schedule
from var.training.validation import Validation, _judged
from var.utils.statistics import clustered


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_curves_take_new_columns_and_go_on_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = Curves(path, fresh=True)
    first.log_metrics({"loss": 3.0}, 1)
    first.log_metrics({"loss": 2.0, "reward": 0.5}, 2)
    first.log_metrics({"loss": 1.5}, 3)
    second = Curves(path, fresh=False)
    second.forget_after(2)  # the checkpoint was written at step 2
    second.log_metrics({"loss": 1.4}, 3)
    assert [(r["step"], r["loss"], r["reward"]) for r in rows(path)] == [
        ("1", "3.0", ""), ("2", "2.0", "0.5"), ("3", "1.4", ""),
    ]  # fmt: skip
    Curves(path, fresh=True)
    assert not path.exists()


@pytest.mark.parametrize(
    ("whole", "cause"),
    [
        ({"length_correlation": -0.6, "largest": 3.0}, "weights follow response length, the shortest taking most"),
        ({"length_correlation": 0.0, "largest": 80.0}, "one response weighs 80 times the mean"),
        ({"length_correlation": 0.0, "largest": 9.0}, "raise loss.temperature"),
    ],
)
def test_a_low_effective_sample_size_is_told_once_with_its_cause(
    whole: dict[str, float], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Health of weights: (Σw)²/Σw² over n. Weights 4, 0, 0, 0 have 1/4."""
    watch = StepMetrics(ess_warning=0.3)
    data = SimpleNamespace(facts={"weights": whole})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    trainer: Any = SimpleNamespace(datamodule=data, loggers=[], optimizers=[optimizer], current_epoch=0, world_size=1)
    module: Any = SimpleNamespace(log=lambda *_, **__: None, gradient_norm=None, skipped=0, rate=0.1)
    module.take_metrics = lambda: {"loss": 1.0, "weight/mean": 1.0, "weight/square": 4.0}
    watch._log(trainer, module, 5)
    watch._log(trainer, module, 6)
    printed = capsys.readouterr().out
    assert printed.count("effective sample size is 0.25") == 1
    assert cause in printed.replace("\n", " ")


def test_metrics_are_sums_over_sums_not_means_of_means() -> None:
    """huggingface/trl #2468: two micro-batches of 1 and 3 tokens, nll 5 and 1: (5 + 3)/4 = 2, not 3."""
    module = AlignmentModule(torch.nn.Linear(1, 1), lambda *_: None, lambda _: None, SCHEDULE)  # type: ignore[arg-type,return-value]
    for total, number in ((5.0, 1.0), (3.0, 3.0)):
        pair = torch.stack([torch.tensor(total), torch.tensor(number)]).double()
        module._sums["nll"] = module._sums.get("nll", torch.zeros(2, dtype=torch.float64)) + pair
    assert module.take_metrics() == {"nll": 2.0}
    assert not module._sums
    assert Mean(torch.tensor(5.0), 1.0).number == 1.0


def test_a_judges_curve_counts_ties_half_as_the_rewards_does() -> None:
    """A win, two ties and a loss by the reward are a half by either; the judge's own win rate is a quarter."""
    after, before = np.array([[2.0], [1.0], [1.0], [0.0]]), np.array([[1.0], [1.0], [1.0], [1.0]])
    assert win_rate(after, before).mean() == 0.5
    assert _judged({"win_rate": 25.0, "mean_score": 0.5}) == {"validation/judge_win_rate": 0.5}
    assert _judged({"win_rate": None, "mean_score": None}) == _judged(None) == {}


def test_a_judge_whose_every_game_fails_is_told_with_the_first_failure(capsys: pytest.CaptureFixture[str]) -> None:
    rows: Any = [SimpleNamespace(id="a", prompt=(), answer=None)]
    data: Any = SimpleNamespace(validation=SimpleNamespace(head=lambda n: rows[:n]))
    answers = Answers([["x"]], np.array([[True]]), np.array([[1]]), None)
    facts = {"max_errors": 0.05, "errors": {"failed": 2}, "first_failure": "400: no model"}
    judge: Any = lambda pairs, advance: Judgement(["error"], np.array([np.nan]), [], facts)  # noqa: E731
    watch = Validation(None, None, None, judge, None, None, Path())  # type: ignore[arg-type]
    watch.before = answers
    watch._verdicts(SimpleNamespace(is_global_zero=True), data, answers)  # type: ignore[arg-type]
    assert "no win rate by the judge: 1 of 1 pairs are in error" in (printed := capsys.readouterr().out)
    assert "The first that failed: 400: no model" in printed


def test_a_single_prompt_has_a_point_and_no_error_in_the_curves() -> None:
    assert _with_error("reward", clustered(np.array([[1.0, 2.0]]))) == {"reward": 1.5}
    assert _with_error("reward", clustered(np.array([[1.0], [2.0]]))) == {"reward": 1.5, "reward_se": 0.5}


def test_a_plan_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(tokens=np.ones(1))
    data = SimpleNamespace(
        members=np.zeros((1, 1)), plan=plan, rows_of_members=np.zeros(1), weights=None, records=lambda n: []
    )
    trainer: Any = SimpleNamespace(datamodule=data, is_global_zero=True)
    PlanFile(tmp_path).on_fit_start(trainer, None)  # type: ignore[arg-type]
    whole = (tmp_path / "plan.npz").read_bytes()
    assert sorted(np.load(tmp_path / "plan.npz")) == ["micro", "row", "tokens"]

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    plan.tokens = np.zeros(9)
    with pytest.raises(OSError, match="No space left"):
        PlanFile(tmp_path).on_fit_start(trainer, None)  # type: ignore[arg-type]
    assert (tmp_path / "plan.npz").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir() if path.name != "batches.jsonl"] == ["plan.npz"]


SCHEDULE = Schedule(kind="cosine", warmup=0.2, floor=0.1)


def test_the_schedule_by_hand() -> None:
    """10 steps, 2 of warm-up: 1/3, 2/3, then floor + (1 − floor)(1 + cos(π·k/8))/2; at k = 4 the middle, 0.55."""
    values = [SCHEDULE.factor(step, 10) for step in range(10)]
    assert values[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert values[6] == pytest.approx(0.55)
    assert SCHEDULE.factor(10, 10) == pytest.approx(0.1)
    linear = Schedule(kind="linear", warmup=0.0, floor=0.0)
    assert [linear.factor(step, 4) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert Schedule(kind="constant", warmup=0.5, floor=0.0).factor(9, 10) == 1.0
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        Schedule(kind="step", warmup=0.0, floor=0.0)  # type: ignore[arg-type]
