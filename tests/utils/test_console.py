"""Logs without a terminal, and the log file of a run."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table

from var.utils import console as module
from var.utils.console import keep_log, label_lines, say, show, stage, warn


def test_log_has_the_time_left_and_the_duration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt takes 15 s after the first, which also waited for the model. A line is due every 30 s."""
    clock = iter([0.0, 100.0, 115.0, 130.0, 145.0, 160.0, 175.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with stage("Answers", 5, "prompts") as advance:
        for _ in range(5):
            advance(1)
    assert capsys.readouterr().out.splitlines() == [
        "Answers: 5 prompts",
        "Answers: 3 of 5 prompts, about 0:00:30 left",
        "Answers: 5 prompts in 0:02:55",
    ]


def test_log_has_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, *(100.0 + 20 * i for i in range(11)), 310.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with stage("Answers", 20, "prompts") as advance:
        for _ in range(11):
            advance(1)
    counts = [line.split()[1] for line in capsys.readouterr().out.splitlines() if " left" in line]
    assert counts == ["3", "5", "7", "9", "11"]


def test_short_stage_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("Scoring", 3, "responses") as advance:
        advance(3)
    assert capsys.readouterr().out == "Scoring: 3 responses\n"


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """The log file of a run, as Hydra sets it up."""
    handler = logging.FileHandler(tmp_path / "train.log")
    logging.getLogger().addHandler(handler)
    yield tmp_path / "train.log"
    logging.getLogger().removeHandler(handler)
    handler.close()


def test_log_file_has_what_the_terminal_had(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say("a line")
    warn("a warning")
    table = Table("name", title="a table")
    table.add_row("a cell")
    show(table)
    printed, logged = capsys.readouterr().out, log_file.read_text()
    for text in ("a line", "a warning", "a table", "a cell"):
        assert text in printed
        assert text in logged


def test_other_ranks_write_nothing(
    log_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    say("a line")
    warn("a warning")
    show(Table("name", title="a table"))
    assert capsys.readouterr().out == log_file.read_text() == ""


def test_commands_that_train_nothing_write_no_log(log_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_logs", True)
    keep_log(False)
    say("a line")
    assert log_file.read_text() == ""


def test_lines_of_jobs_at_once_are_labeled(
    log_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_label", "")
    label_lines("#3")
    with stage("Scoring", 3, "responses"):
        say("a line")
        warn("a warning")
    assert capsys.readouterr().out == "#3 Scoring: 3 responses\n#3 a line\n#3 Warning: a warning\n"
    assert "#3" not in log_file.read_text()
