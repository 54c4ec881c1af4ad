"""Messages with everything that a template can read."""

import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.helpers.runs import write_lines
from var.data.messages import Prompt, parse_prompt, prompt_content, render_message
from var.data.read import read
from var.data.sources.files import Files

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Bergen", "unit": None}}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "rain"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_all_keys_of_a_row_are_read_back(tmp_path: Path):
    """A row keeps tool calls with their null arguments, names, ids, tools, template arguments and sampled tokens."""
    response = {"text": "", "message": {"tool_calls": [CALL]}, "ids": [3, 1, 2], "score": 1.0}
    record = {"id": "a", "prompt": HISTORY, "responses": [response], "tools": TOOLS,
              "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    row = read(Files(path=str(write_lines(tmp_path / "rows.jsonl", [record]))), tmp_path)[0]
    assert list(row.prompt) == HISTORY
    assert list(row.prompt.tools) == TOOLS
    assert row.prompt.template_kwargs == {"enable_thinking": False}
    assert row.responses[0].message == {"tool_calls": [CALL]}
    assert row.responses[0].ids == (3, 1, 2)


def test_arrow_nulls_are_not_keys_of_messages(tmp_path: Path):
    """Parquet has every key in every message, and every argument in every tool call."""
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    history = [HISTORY[0], {"role": "assistant", "content": "", "tool_calls": [CALL, other]}, HISTORY[2]]
    datasets.Dataset.from_list([{"id": "a", "prompt": history, "responses": ["Yes."]}]).to_parquet(
        str(tmp_path / "rows.parquet")
    )
    row = read(Files(path=str(tmp_path / "rows.parquet")), tmp_path)[0]
    calls = row.prompt[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [{"place": "Bergen"}, {"zone": "CET"}]
    assert set(row.prompt[0]) == {"role", "content"}


def test_prompts_differ_by_tools_and_arguments():
    """What renders differently is another prompt, also after pickling."""
    plain, tooled, short = Prompt(HISTORY), Prompt(HISTORY, TOOLS), Prompt(HISTORY, (), {"enable_thinking": False})
    assert plain != tooled
    assert tooled != short
    assert plain == tuple(HISTORY)
    assert pickle.loads(pickle.dumps(tooled)) == tooled
    assert len({json.dumps(prompt_content(prompt)) for prompt in (plain, tooled, short)}) == 3


def test_content_in_text_parts_is_joined():
    """Content can be a list of parts; images are an error."""
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert parse_prompt([{"role": "user", "content": parts}])[0]["content"] == "a b"
    with pytest.raises(ValueError, match="type text only"):
        parse_prompt([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}])
    with pytest.raises(ValueError, match="'role' and 'content'"):
        parse_prompt([{"role": "user", "content": None}])


def test_tool_calls_are_shown_to_readers_without_a_template():
    """A judge reads the content of a message and its tool calls."""
    assert render_message(HISTORY[1]) == json.dumps(CALL)
    assert render_message({"role": "user", "content": "a"}) == "a"
