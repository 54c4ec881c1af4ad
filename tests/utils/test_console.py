"""Logs without a terminal."""

import pytest

from var.utils import console as module
from var.utils.console import stage


@pytest.mark.parametrize(
    ("times", "line"),
    [
        ([100.0, 120.0, 130.0, 140.0], "Answers: 3 of 10 prompts, about 0:01:45 left"),
        ([100.0, 110.0, 120.0, 129.0], None),
    ],
)
def test_log_has_the_time_left_once(
    times: list[float], line: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts take 30 s after the first, which also waited for the model, so seven take 105 s."""
    clock = iter(times)
    with stage("Answers", 10, "prompts") as advance:
        monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
        for _ in times:
            advance(1)
        monkeypatch.undo()
    assert [found for found in capsys.readouterr().out.splitlines() if " left" in found] == ([line] if line else [])
