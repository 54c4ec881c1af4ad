"""The work that a dry run counts: tokens, floating-point operations, and the time at a measured speed."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import composed, write_lines
from var.config.schema import TrainerSettings
from var.training.run import Run
from var.training.work import Operations, count_operations, count_parameters, count_work, describe_time

N = 1000
"""Parameters of a model."""


def make_run(options: list[str], folder: Path, *words: str, prepare: bool = True) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    run = Run.compose(composed(*options, *words), folder)
    if prepare:
        run.data.prepare()
    return run


def test_tokens_of_a_plan_are_exact_and_those_of_rows_close(options: list[str], tmp_path: Path) -> None:
    words = ["loss=sft", "trainer.epochs=3"]
    run = make_run(options, tmp_path / "a", *words)
    work = count_work(run)
    assert work is not None
    sequences = run.data.training_set.sequences
    exact = int((sequences.start + sequences.length).sum())
    assert (work.planned, work.tokens, work.steps) == (True, 3 * exact, 3 * run.data.report.steps_per_epoch)
    unplanned = make_run(options, tmp_path / "b", *words, prepare=False)
    unplanned.data.read_rows()
    estimate = count_work(unplanned)
    assert estimate is not None
    assert not estimate.planned
    assert estimate.steps == work.steps
    assert estimate.tokens == pytest.approx(work.tokens, rel=0.1)
    assert "about" in estimate.describe()


@pytest.mark.parametrize(
    ("words", "training", "annotating"),
    [
        (["loss=sft"], 6, 0),
        (["loss=sft", "model.gradient_checkpointing=true"], 8, 0),
        (["loss=var_grouped"], 6, 0),  # it does not read the reference
        (["loss=dpo", "data.micro_batch=1", "data.global_batch=1"], 6, 2),
    ],
)
def test_operations_per_parameter_and_token(
    words: list[str], training: int, annotating: int, options: list[str], tmp_path: Path
) -> None:
    run = make_run(options, tmp_path, "eval.enabled=false", "trainer.epochs=2", *words)
    work = count_work(run)
    assert work is not None
    assert count_operations(run, work, N) == Operations(annotating * N * work.tokens / 2, training * N * work.tokens, 0)


def test_sampled_responses_and_an_epoch_that_ends_early_are_counted(tmp_path: Path, tiny_folder: Path) -> None:
    """20 of 30 prompts train, with 3 answers each: 60 sequences, or 15 steps of 4, of which 2 are trained."""
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "answer": "1"} for i in range(30)])
    words = [
        "data=files", f"data.path={rows}", f"model.path={tiny_folder}", "reward=exact_number", "data.limit=24",
        "data.validation_prompts=4", "generate.responses=3", "generate.max_new_tokens=5", "data.global_batch=4",
        "data.micro_batch=4", "trainer.epochs=7", "trainer.max_steps=2", "loss=dpo", "data.responses=sampled",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", f"runs={tmp_path}/runs",
        "trainer.accelerator=cpu", "eval.enabled=false",
    ]  # fmt: skip
    run = make_run(words, tmp_path / "run", prepare=False)
    run.data.read_rows()
    work = count_work(run)
    assert work is not None
    pairs = 20 // 4 * 8  # a pair per prompt
    length = work.tokens_per_epoch // pairs
    assert (work.prompts, work.samples, work.steps, work.tokens) == (20, True, 2, 2 * 8 * length)
    found = count_operations(run, work, N, "cpu")
    assert found.annotating == 20 * 3 * 5 * 4 * N + 2 * N * pairs * length
    sft = make_run([*words, "loss=sft"], tmp_path / "sft", prepare=False)
    sft.data.read_rows()
    assert count_work(sft).steps == 2  # type: ignore[union-attr]
    assert count_work(sft).tokens_per_epoch == 60 * length  # type: ignore[union-attr]


@pytest.mark.parametrize(("every", "times"), [("null", 2), ("2", 3)])
def test_evaluations_are_counted(every: str, times: int, options: list[str], tmp_path: Path) -> None:
    """Each samples, and reads the answers with two models. 4 steps, evaluated every 2, end with an evaluation."""
    words = ["loss=sft", f"eval.every_n_steps={every}", "trainer.max_steps=4", "trainer.epochs=9"]
    run = make_run(options, tmp_path, *words, "data.validation_prompts=2", "eval.sampling.responses=3")
    work = count_work(run)
    assert work is not None
    tokens = 2 * 3 * run.cfg.eval.sampling.max_new_tokens
    found = {kind: count_operations(run, work, N, kind).evaluating for kind in ("cpu", "cuda")}  # type: ignore[arg-type]
    assert found == {"cpu": times * tokens * N * (4 + 4), "cuda": pytest.approx(times * tokens * N * (20 + 4))}


def test_time_is_operations_over_the_speed_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var.training.work.measure_speed", lambda *_: 1e9)
    settings: Any = TrainerSettings(**composed("trainer.accelerator=cpu").trainer)
    text = describe_time(Operations(0.85e9, 51e9, 3060e9), settings)
    assert text.startswith(
        "time, about: annotation 0:00:01, training 0:01:00, evaluation 1:00:00 (at 85% of the 1 GFLOP/s"
    )
    limited: Any = TrainerSettings(**composed("trainer.accelerator=cpu", "trainer.max_seconds=31").trainer)
    assert "annotation 0:00:01, training 0:00:30," in describe_time(Operations(0.85e9, 51e9, 0), limited)
    monkeypatch.undo()
    speed = re.search(r"of the ([\d,]+) GFLOP/s of a matrix product here", describe_time(Operations(1, 1, 1), settings))
    assert speed
    assert 0 < int(speed[1].replace(",", "")) < 1e5


def test_parameters_of_an_architecture_are_those_of_its_model() -> None:
    """SmolLM2-135M has 134,515,008 parameters. Those of its norms are not counted."""
    assert count_parameters(composed("model=smollm2-135m").model) == pytest.approx(134_515_008, rel=1e-3)
    assert count_parameters(composed("reward=exact_number").reward) == 0
