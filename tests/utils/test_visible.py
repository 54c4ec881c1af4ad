"""Text from data, models and servers reaches the terminal and the log without control characters."""

import io
import logging
import sys
import warnings
from pathlib import Path

import pytest
from rich.table import Table

from tests.helpers.cli import run
from tests.helpers.runs import write_lines
from var.utils.console import console, say, stage, warn
from var.utils.visible import protect_terminal, visible

HOSTILE = "\x1b]0;title\x07 \x1b[2J \x9b31m \u202egnp.exe \u2066 \r\x08 [math] [/x] [bold]b[/bold] :smile: \ud83d ok"
SHOWN = r"\x1b]0;title\x07 \x1b[2J \x9b31m \u202egnp.exe \u2066 \r\x08 [math] [/x] [bold]b[/bold] :smile: \ud83d ok"


def test_controls_become_visible():
    assert visible(HOSTILE) == SHOWN
    assert visible("a\tb\nü漢🙂 \\x1b") == "a\tb\nü漢🙂 \\x1b"


def test_console_prints_names_literally(capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 400)
    say(HOSTILE)
    warn(HOSTILE)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    with stage(f"{HOSTILE} ", 1, "[/units]") as advance:
        advance(1)
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 6
    assert "[/units]" in printed
    assert not set(HOSTILE) & set("\x1b\x9b\u202e\u2066\x08") & set(printed)


def test_progress_bar_prints_names_literally(capsys, monkeypatch):
    for name, value in (("_width", 400), ("_force_terminal", True), ("_color_system", None)):
        monkeypatch.setattr(console, name, value)
    with stage(f"{HOSTILE} ", 1, "[/units]") as advance:
        advance(1)
    printed = capsys.readouterr().out
    assert "━" in printed
    assert SHOWN in printed
    assert "1/1 [/units]" in printed


def test_tokens_of_debug_rows_are_visible(tokenizer, capsys):
    from var.data.chat import Chat
    from var.training.show_rows import show_tokens

    chat = Chat(tokenizer)
    show_tokens(chat, tokenizer("a\x1b[2Jb")["input_ids"], 1)
    assert r"\x1b[2Jb" in capsys.readouterr().out


@pytest.fixture
def received():
    """Return what standard error receives after `protect_terminal`."""
    before = logging.getLogRecordFactory()
    yield io.StringIO()
    logging.setLogRecordFactory(before)


def test_logs_of_libraries_are_visible(received, monkeypatch, tmp_path: Path):
    """math-verify logs the answer that it cannot parse, with a traceback."""
    monkeypatch.setattr(sys, "stderr", received)
    protect_terminal()
    logger, file = logging.getLogger("math_verify.test"), tmp_path / "log"
    handlers = [logging.StreamHandler(sys.stderr), logging.FileHandler(file)]
    for handler in handlers:
        logger.addHandler(handler)
    logger.warning("Could not parse %s", HOSTILE[:-4])
    logger.warning({"a": 1})
    try:
        raise ValueError(HOSTILE[:-4])
    except ValueError:
        logger.exception("failed")
    for handler in handlers:
        logger.removeHandler(handler)
        handler.close()
    for text in (received.getvalue(), file.read_text()):
        assert text.count(r"\x1b[2J \x9b31m \u202egnp.exe") == 2
        assert "{'a': 1}" in text
        assert not {"\x1b", "\x9b", "\u202e"} & set(text)


def test_warnings_and_other_text_on_standard_error_are_visible(received, monkeypatch):
    monkeypatch.setattr(sys, "stderr", received)
    protect_terminal()
    sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, "file", 1))
    print("\x1b[31mred\x1b[0m\r50%", file=sys.stderr)
    text = received.getvalue()
    assert r"\x1b]0;title\x07 \x1b[2J" in text
    assert "\x1b[31mred\x1b[0m\r50%" in text  # colors and progress bars
    assert sys.stderr.isatty() is False


def test_error_of_a_hostile_row_is_visible(options, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"id": HOSTILE, "prompt": "a", "responses": [{"text": 3}]}])
    done = run("train.py", *options, f"data.path={path}")
    assert done.returncode == 1
    assert not {"\x1b", "\x9b", "\u202e"} & set(done.stderr + done.stdout)
