"""Forms of records: each becomes the rows that its columns say, and other forms are one clear error."""

import csv
import gzip
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import pytest
from hypothesis import strategies as st

from tests.data.test_fuzz import fuzz
from tests.helpers.runs import ROOT
from var.data.read import read
from var.data.row import Row
from var.data.rows import Rows
from var.data.sources import hub
from var.data.sources.files import Files
from var.data.sources.forms import FORMS
from var.data.sources.pairs import make_pair
from var.data.sources.preferences import Preferences
from var.data.sources.prompts import Prompts
from var.utils.errors import UserError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Bergen"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
Short = tuple[str, list[tuple[str, float | None]]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read_text(folder: Path, name: str, content: str | bytes, kind: Any = Files, **settings: Any) -> Rows:
    """Write a file and read it."""
    folder.mkdir(exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return read(kind(path=str(folder / name), **settings), folder / "cache")


def shorten(row: Row) -> Short:
    """Return a row as (text of its prompt, its responses with scores)."""
    return row.prompt[-1]["content"], [(response.text, response.score) for response in row.responses]


def problem(folder: Path, name: str, content: str | bytes, kind: Any = Files, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        read_text(folder, name, content, kind, **settings)
    return str(error.value)


# --- files


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "ids"),
    [
        ("a.jsonl", lines({"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}), [":1", ":2"]),
        ("a.json", lines({"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}), [":1", ":2"]),
        ("a.ndjson", '{"prompt": "a", "response": "b"}\n\n{"prompt": "c", "response": "d"}', [":1", ":3"]),
        ("a.json", '[{"prompt": "a", "response": "b"},\n {"prompt": "c", "response": "d"}]\n', [":row 1", ":row 2"]),
        ("a.jsonl", '\n[{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]', [":row 1", ":row 2"]),
        ("a.csv", "prompt,response\na,b\nc,d\n", [":2", ":3"]),
        ("a.csv", '"prompt";"response"\na;b\n\nc;d', [":2", ":4"]),
        ("a.tsv", "response\tprompt\nb\ta\nd\tc\n", [":2", ":3"]),
    ],
)
@pytest.mark.parametrize("encode", [str.encode, lambda text: text.replace("\n", "\r\n").encode("utf-8-sig")])
def test_file_formats_have_equal_rows(tmp_path, name, content, ids, suffix, encode):
    """Also with a byte order mark and CRLF, and compressed."""
    rows = read_text(tmp_path, name + suffix, encode(content))
    assert list(map(shorten, rows)) == [("a", [("b", None)]), ("c", [("d", None)])]
    assert [row.id for row in rows] == [f"{name}{suffix}{id}" for id in ids]


def test_compressed_file_without_the_suffix_is_read(tmp_path):
    rows = read_text(tmp_path, "a.jsonl", gzip.compress(lines({"prompt": "a", "response": "b"}).encode()))
    assert list(map(shorten, rows)) == [("a", [("b", None)])]


def test_folder_may_mix_file_formats(tmp_path):
    """Files of other programs, whose names begin with a point, are not read."""
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt,response\na,b\n")
    (folder / "b.json").write_text('[{"prompt": "c", "response": "d"}]')
    datasets.Dataset.from_list([{"prompt": "e", "response": "f"}]).to_parquet(str(folder / "c.parquet"))
    (folder / "._a.csv").write_bytes(b"\0\1")
    rows = read(Files(path=str(folder)), tmp_path / "cache")
    assert [shorten(row)[0] for row in rows] == ["a", "c", "e"]
    assert rows.form == "a.csv, b.json, c.parquet: one response per record, from the columns prompt, response"


def test_table_cells_are_read_exactly(tmp_path):
    """Line ends and quotes in cells, long cells, a column without a name, and empty cells."""
    long = "x" * 200_000
    content = f',prompt,response,score\n0,"a ""b"",\n c",{long},3.5\n1,d,e,\n,,,\n'
    rows = read_text(tmp_path, "a.csv", content)
    assert list(map(shorten, rows)) == [('a "b",\n c', [(long, 3.5)]), ("d", [("e", None)])]
    assert [row.id for row in rows] == ["a.csv:2", "a.csv:4"]
    assert rows.form.endswith("unused columns: one without a name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,response\na,b\nc,d,e\n", "a.csv:3: it has 3 values, and the first line names 2 columns"),
        ("a.csv", 'prompt,response\na,b\nc,"d\ne\n', "a.csv:3: not readable as a table (unexpected end of data)"),
        ("a.csv", b"prompt,response\na,b\nc,\xe9\n", "a.csv:3: not UTF-8 text: byte 0xe9"),
        ("a.csv", "prompt,prompt\na,b\n", "several columns have the name 'prompt'"),
        ("a.xlsx", b"PK\x03\x04", "a ZIP file, as Excel and Numbers write. Save it as CSV or Parquet"),
        ("a.csv", "prompt,response\na,b\n".encode("utf-16"), "text in UTF-16. Save it as UTF-8"),
        ("a.csv", "prompt,response\n", "it has no rows"),
        ("a.csv", "a,b\nc,d\n", "none of the known forms has the columns 'a', 'b'"),
        ("a.csv", "prompt,response\n\"[{'role': 'user'}]\",b\n", "a.csv:2: 'prompt' is a list in Python's notation"),
        ("a.json", '[{"prompt": "a"},\n{"prompt" "b"}]', "not a JSON array: Expecting ':' delimiter: line 2"),
        ("a.json", json.dumps({"prompt": "a"}, indent=1), "one JSON object over several lines"),
        ("a.json", "[]", "it has no rows"),
    ],
)  # fmt: skip
def test_unreadable_file_is_one_error_with_the_place(tmp_path, name, content, message):
    assert message in problem(tmp_path, name, content)


def test_text_that_begins_as_a_zip_file_is_read(tmp_path):
    """PK is a usual name of a primary key."""
    rows = read_text(tmp_path, "a.csv", "PK,prompt,response\n1,a,b\n")
    assert list(map(shorten, rows)) == [("a", [("b", None)])]


def test_saved_folder_of_datasets_is_named(tmp_path):
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"d: a folder of save_to_disk\. Write a file with to_parquet"):
        read(Files(path=str(tmp_path / "d")), tmp_path / "cache")


def test_large_table_is_streamed(tmp_path):
    """Taking the first row reads only the beginning of the file."""
    with (tmp_path / "a.csv").open("wb") as file:
        file.write(b"prompt,response\n" + b"a,b\n" * 100_000)
        file.write(b"\xff\n")
    records = Files(path=str(tmp_path / "a.csv")).records()
    assert next(records) == ("a.csv:2", {"prompt": "a", "response": "b"})
    with pytest.raises(UserError, match=r"a\.csv:100002: not UTF-8"):
        list(records)


# --- forms

FLAT = ("a", [("b", 3.5), ("c", -1.0)])


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{"prompt": "a", "responses": ["b"]}, {"prompt": "c", "responses": ["d"]}],
         [("a", [("b", None)]), ("c", [("d", None)])]),
        ([{"prompt": "a", "responses": [{"text": "b", "score": "3.5"}, assistant("c", score="-1e0")]}], [FLAT]),
        ([{"prompt": "a", "response": "b", "score": "3.5"}, {"prompt": "a", "response": "c", "score": -1}], [FLAT]),
        ([{"prompt": [user("a")], "completion": [assistant("b")], "label": True},
          {"prompt": [user("a")], "completion": assistant("c"), "label": 0}], [("a", [("b", 1.0), ("c", 0.0)])]),
        ([{"instruction": "a", "input": "x", "output": "b"}, {"instruction": "a", "input": "", "output": "c"}],
         [("a\n\nx", [("b", None)]), ("a", [("c", None)])]),
        ([{"question": "a", "response": "b", "answer": 4}], [("a", [("b", None)])]),
        ([{"messages": [user("x"), assistant("y"), user("a"), assistant("b")], "prompt": "x"}], [("a", [("b", None)])]),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "3.5", "score_rejected": -1}], [FLAT]),
        ([{"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}],
         [("a", [("b", None), ("c", None)])]),
        ([{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}],
         [("a", [("b", None), ("c", None)])]),
        ([{"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}],
         [("a", [("b", None), ("c", None)])]),
        ([{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
         [("The sky is", [(" blue.", None), (" green.", None)])]),
        ([{"chosen": "I saw cats", "rejected": "I saw cars"}], [("I saw", [(" cats", None), (" cars", None)])]),
        ([{"chosen": "天空是蓝色", "rejected": "天空是绿色"}], [("天空是", [("蓝色", None), ("绿色", None)])]),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "messages": [user("a")]}],
         [("a", [("b", None), ("c", None)])]),
        ([{"prompt": "a"}, {"prompt": "c", "answer": "4"}], [("a", []), ("c", [])]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", ["jsonl", "csv"])
def test_records_of_each_form_become_rows(tmp_path, records, expected, write):
    """A table has lists as JSON."""
    if write == "csv":
        if any(isinstance(value, dict) for record in records for value in record.values()):
            pytest.skip("a table has lists of messages only")
        names = list(dict.fromkeys(name for record in records for name in record))
        text = io.StringIO()
        table = csv.DictWriter(text, names)
        table.writeheader()
        for record in records:
            cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()}
            table.writerow(cells)
        rows = read_text(tmp_path, "a.csv", text.getvalue())
    else:
        rows = read_text(tmp_path, "a.jsonl", lines(*records))
    assert list(map(shorten, rows)) == expected
    assert all(row.ordered for row in rows) == ("chosen" in records[0])


@pytest.mark.parametrize("write", ["jsonl", "parquet"])
def test_responses_keep_the_further_keys_of_their_message(tmp_path, write):
    """In every form, with tools as a list or as JSON, and arguments of the template."""
    answer, other = assistant("b", reasoning_content="r"), assistant("", tool_calls=[CALL])
    more = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}, "id": 7}
    for i, record in enumerate(
        [
            {"prompt": [user("a")], "chosen": [answer], "rejected": [other]},
            {"chosen": [user("a"), answer], "rejected": [user("a"), other]},
            {"prompt": "a", "responses": [answer, other]},
            {"prompt": "a", "response": [answer]},
            {"messages": [user("a"), answer]},
        ]
    ):
        if write == "jsonl":
            record = {**record, **more, "tools": json.dumps([TOOL])}
            (row,) = read_text(tmp_path / str(i), "a.jsonl", lines(record))
        else:
            (tmp_path / str(i)).mkdir()
            datasets.Dataset.from_list([{**record, **more}]).to_parquet(str(tmp_path / str(i) / "a.parquet"))
            (row,) = read(Files(path=str(tmp_path / str(i) / "a.parquet")), tmp_path / "cache")
        messages = [{"reasoning_content": "r"}, {"tool_calls": [CALL]}][: len(row.responses)]
        assert [dict(response.message) for response in row.responses] == messages
        assert [response.text for response in row.responses] == ["b", ""][: len(row.responses)]
        assert (list(row.prompt), list(row.prompt.tools), row.id) == ([user("a")], [TOOL], "7")
        assert row.prompt.template_kwargs == {"enable_thinking": False}


def test_pairs_of_other_adapters_keep_the_keys_too():
    row = make_pair("i", "a", assistant("", tool_calls=[CALL]), [assistant("c", reasoning_content="r")])
    assert row is not None
    assert [dict(response.message) for response in row.responses] == [
        {"tool_calls": [CALL]},
        {"reasoning_content": "r"},
    ]
    assert make_pair("i", "a", assistant(""), "c") is None


def test_history_with_tools_is_kept(tmp_path):
    history = [user("Rain?"), assistant("", tool_calls=[CALL]),
               {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "rain"}]  # fmt: skip
    (row,) = read_text(tmp_path, "a.jsonl", lines({"id": "1", "prompt": history, "responses": ["Yes."]}))
    assert list(row.prompt) == history


def test_records_of_one_prompt_are_one_row_in_order(tmp_path):
    """Those with another answer or subset are not, nor pairs. The row has the first id."""
    records = [
        {"id": 1, "prompt": "a", "response": "b", "score": 1},
        {"id": 2, "prompt": "c", "response": "d", "score": 2},
        {"id": 3, "prompt": "a", "response": "e", "score": 3},
        {"id": 1, "prompt": "a", "response": "b", "score": 4},
        {"id": 4, "prompt": "a", "response": "b", "score": 5, "answer": "x"},
    ]
    rows = read_text(tmp_path, "a.jsonl", lines(*records))
    assert [(row.id, *shorten(row)) for row in rows] == [
        ("1", "a", [("b", 1.0), ("e", 3.0), ("b", 4.0)]), ("2", "c", [("d", 2.0)]), ("4", "a", [("b", 5.0)]),
    ]  # fmt: skip
    assert rows.merged == 2
    assert rows.description == (
        "a.jsonl: one response per record, from the columns id, prompt, response, score, answer; 3 rows, 2 records "
        "joined to rows of the same prompt"
    )
    pairs = [{"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in "xy"]
    assert len(read_text(tmp_path / "pairs", "a.jsonl", lines(*pairs))) == 2


@pytest.mark.parametrize("id", [1, "1", 1.0])
def test_integer_ids_are_text(tmp_path, id):
    assert [row.id for row in read_text(tmp_path, "a.jsonl", lines({"id": id, "prompt": "a"}))] == ["1"]


def test_equal_ids_of_different_prompts_are_an_error(tmp_path):
    records = lines({"id": 1, "prompt": "a", "response": "b"}, {"id": "1", "prompt": "c", "response": "d"})
    assert "a.jsonl:2: id '1' is also the id of a.jsonl:1. data.columns='{id: null}'" in problem(
        tmp_path, "a.jsonl", records
    )
    rows = read_text(tmp_path, "a.jsonl", records, columns={"id": None})
    assert [row.id for row in rows] == ["a.jsonl:1", "a.jsonl:2"]
    answers = lines(*({"id": 1, "prompt": "a", "response": "b", "answer": x} for x in "12"))  # these are not joined
    assert "a.jsonl:2: id '1' is also the id of a.jsonl:1" in problem(tmp_path / "answers", "a.jsonl", answers)


def test_columns_are_renamed(tmp_path):
    """A column with one of our names and another meaning is not read."""
    record = {"q": "a", "prompt": "instructions", "good": "b", "bad": "c", "rank": "2"}
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": "rank"}
    rows = read_text(tmp_path, "a.jsonl", lines(record), Preferences, columns=columns)
    assert list(map(shorten, rows)) == [("a", [("b", 2.0), ("c", None)])]
    message = problem(tmp_path, "a.jsonl", lines(record), Preferences, columns={**columns, "rejected": "worse"})
    assert (
        message
        == "data.columns: 'worse' is not a column of a.jsonl. Its columns are 'q', 'prompt', 'good', 'bad', 'rank'"
    )
    message = problem(tmp_path, "a.jsonl", lines(record), Preferences, columns={"promt": "q"})
    assert message.startswith("data.columns: unknown names promt. The names are answer,")


def test_unused_columns_are_listed_once(tmp_path):
    """Also those of later records. Columns without a value are not."""
    records = [{"prompt": "a", "response": "b", "topic": 1, "note": None}] * 70 + [
        {"prompt": "a", "response": "b", "respones": 1}
    ]
    rows = read_text(tmp_path, "a.jsonl", lines(*records))
    assert rows.form.endswith("from the columns prompt, response; unused columns: topic, respones (is it responses?)")


# --- errors


def test_mixed_forms_are_errors_by_row(tmp_path):
    records = [
        {"prompt": "a", "response": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"},
        {"messages": [user("a"), assistant("b")]}, {"prompt": "d", "responses": ["e"]},
        {"prompt": "a", "response": "b"},
    ]  # fmt: skip
    assert problem(tmp_path, "a.jsonl", lines(*records)).splitlines() == [
        "Files: invalid rows (4):",
        "  a.jsonl:2: it has the form of pairs, and the first record that of one response per record. "
        "Put them into two files",
        "  a.jsonl:3: missing 'response'; also a.jsonl:5",
        "  a.jsonl:4: it has the form of conversations, whose last message is the response, and the first record that "
        "of one response per record. Put them into two files",
        'Found: {"prompt": "a", "chosen": "b", "rejected": "c"}',
        'Valid: {"prompt": "How do tides work?", "response": "The moon …", "score": 1.5}',
    ]


def test_similar_problems_are_listed_once_with_a_valid_row(tmp_path):
    records = [{"prompt": f"p{i}", "response": "x", "score": "high" if i % 2 else 1} for i in range(40)]
    assert problem(tmp_path, "a.jsonl", lines(*records)).splitlines() == [
        "Files: invalid rows (20):",
        "  a.jsonl:2: 'score' must be a number, got 'high'; also a.jsonl:4, a.jsonl:6, a.jsonl:8 and 16 more",
        'Found: {"prompt": "p1", "response": "x", "score": "high"}',
        'Valid: {"prompt": "How do tides work?", "response": "The moon …", "score": 1.5}',
    ]


@pytest.mark.parametrize("score", ["high", "3,5", "1_000", "0x1", "", "nan", "inf", True, [1]])
def test_other_texts_are_no_scores(tmp_path, score):
    assert "a.jsonl:1: 'score' must be a number" in problem(
        tmp_path, "a.jsonl", lines({"prompt": "a", "response": "b", "score": score})
    )


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        (Files, {"question": "a", "answer": "b"}, "data.columns='{prompt: question, response: answer}'"),
        (Files, {"prompt": "a", "reply": "b"}, "data.columns='{response: reply}'"),
        (Files, {"prompt": "a", "chosen": "b", "rejeceted": "c"}, "it has 'chosen' without 'rejected'; the columns are "
         "prompt, chosen, rejeceted. If 'rejeceted' is 'rejected', set data.columns="
         "'{rejected: rejeceted}'"),
        (Files, {"prompt": "a", "rejected": "b", "good": "c"}, "Name its column, as in data.columns='{chosen: …}'"),
        (Files, {"promt": "a", "response": "b"}, "If 'promt' is 'prompt', set data.columns='{prompt: promt}'"),
        (Files, {"prompt": "a", "response": ["b", "c"]}, "The column of several responses is 'responses'"),
        (Files, {"prompt": "a", "completion": [user("x"), assistant("b")]}, "'response' has several messages"),
        (Files, {"prompt": "a", "completion": "b", "label": "maybe"}, "'label' must be true or false, got 'maybe'"),
        (Files, {"chosen": "Blue.", "rejected": "The sky"}, "do not begin with the same words"),
        (Files, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "data=hh_rlhf"),
        (Files, {"prompt": [user("x")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
         "other messages before the answer than 'prompt'"),
        (Files, {"messages": [assistant("b")]}, "no message before the assistant's"),
        (Files, {"prompt": "a", "response": "b", "tools": "weather"}, "'tools' is text that is not JSON"),
        (Preferences, {"prompt": "a", "chosen": "b", "rejeceted": "c"}, "data.columns='{rejected: rejeceted}'"),
        (Preferences, {"prompt": "a", "response": "b"}, "it has the form of one response per record. Use data=files"),
        (Prompts, {"prompt": "a", "responses": ["b"]}, "it has responses. Use data=files"),
        (Prompts, {"messages": [user("a"), assistant("b")]}, "it has responses. Use data=files"),
    ],
)  # fmt: skip
def test_unclear_records_are_errors_with_advice(tmp_path, kind, record, message):
    assert message in problem(tmp_path, "a.jsonl", lines(record), kind)


def test_prompts_are_read_from_every_form_without_responses(tmp_path):
    for i, (name, content) in enumerate(
        [
            ("a.csv", "question,answer,level\na,4,hard\n"),
            ("a.jsonl", lines({"messages": [user("a")], "answer": 4})),
            ("a.json", '[{"prompt": "a", "answer": "4"}]'),
        ]
    ):
        (row,) = read_text(tmp_path / str(i), name, content, Prompts)
        assert (list(row.prompt), row.responses, row.answer) == ([user("a")], (), "4")
    rows = read_text(tmp_path, "a.txt", "\ufefffirst\r\n\r\n[second]\r\n", Prompts)
    assert [row.prompt[0]["content"] for row in rows] == ["first", "[second]"]


def test_empty_pairs_are_skipped_in_preferences_and_errors_in_files(tmp_path):
    records = "prompt,chosen,rejected\na,b,c\nd,,e\n,f,g\n"
    rows = read_text(tmp_path, "a.csv", records, Preferences)
    assert (list(map(shorten, rows)), rows.left_out) == ([("a", [("b", None), ("c", None)])], 2)
    message = problem(tmp_path, "a.csv", records)
    assert "a.csv:3: response 0 is empty" in message
    assert "a.csv:4: its prompt is empty" in message


def test_hub_set_is_read_in_any_form(tmp_path, monkeypatch):
    hub.load.cache_clear()
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])
    )
    rows = read(Files(path="org/set"), tmp_path)
    assert list(map(shorten, rows)) == [("a", [("b", None)])]
    assert rows.form == "org/set[train]: one response per record, from the columns instruction, output"
    hub.load.cache_clear()


def test_mistyped_folder_is_not_a_hub_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"data/rows: no such file or folder. Set `data.path=`"):
        read(Files(path="data/rows"), tmp_path / "cache")


# --- properties

WORDS = st.text("ab \n\"',;\t[é", min_size=1, max_size=8).filter(lambda text: text.strip() == text)


@fuzz(60)
@hypothesis.given(
    records=st.lists(st.tuples(WORDS, WORDS, st.none() | st.integers(-9, 9)), min_size=1, max_size=5),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.csv.gz", "a.parquet"]),
)
def test_all_formats_have_the_same_rows(records: list[tuple[str, str, int | None]], name: str) -> None:
    """Every response of every prompt, in the order of the first record of each prompt."""
    expected: dict[str, list[tuple[str, float | None]]] = {}
    for prompt, response, score in records:
        expected.setdefault(prompt, []).append((response, score))
    table = [{"prompt": p, "response": r, "score": s} for p, r, s in records]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        if name.endswith(".parquet"):
            datasets.Dataset.from_list(table).to_parquet(str(file))
        elif name.endswith((".jsonl", ".json")):
            file.write_text(lines(*table) if name.endswith("l") else json.dumps(table, indent=1))
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, ["prompt", "response", "score"], delimiter="\t" if "tsv" in name else ",")
            writer.writeheader()
            writer.writerows(table)
            content = text.getvalue().encode()
            file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        rows = read(Files(path=str(file)), Path(folder) / "cache")
        assert list(map(shorten, rows)) == list(expected.items())


@fuzz(100)
@hypothesis.given(
    prefix=st.text("ab .", max_size=6), ends=st.tuples(st.text("cd .", max_size=4), st.text("cd .", max_size=4))
)
def test_implicit_prompt_and_responses_are_the_texts(prefix: str, ends: tuple[str, str]) -> None:
    """The prompt is what both begin with, and does not end within a word."""
    chosen, rejected = prefix + ends[0], prefix + ends[1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            (row,) = read_text(Path(folder), "a.jsonl", lines({"chosen": chosen, "rejected": rejected}))
        except UserError:
            return
        prompt = row.prompt[0]["content"]
        assert [prompt + response.text for response in row.responses] == [chosen, rejected]
        assert prompt.strip()
        assert all(text.startswith(prompt) for text in (chosen, rejected))
        assert not any(re.match(r"\w\w", text[len(prompt) - 1 :]) for text in (chosen, rejected))


# --- documentation


def test_examples_of_forms_are_valid():
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            (row,) = read_text(Path(folder), "a.jsonl", lines(form.example))
            assert row.responses


def test_documented_forms_are_read(tmp_path):
    """Each example of docs/data.md is a file that the command above its section reads."""
    page = (ROOT / "docs" / "data.md").read_text()
    section = page.split("## Forms\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(json|csv)\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 6
    for i, (suffix, content) in enumerate(blocks):
        name = "a.csv" if suffix == "csv" else "a.jsonl"
        rows = read_text(tmp_path / str(i), name, content)
        assert len(rows)
        assert all(row.responses for row in rows)


@pytest.mark.parametrize(
    ("record", "words", "kind"),
    [
        ({"messages": [user("a"), {"role": "model", "content": "b"}]}, "the last message has the role 'model'", Files),
        ({"messages": [user("a"), {"role": "Assistant", "content": "b"}]}, "the role 'Assistant' must be", Files),
        (
            {"prompt": [user("a"), {"role": "bot", "content": "b"}], "response": "c"}, "the last message has the role",
            Files,
        ),
        (
            {"prompt": "c", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")]},
            "'prompt' is not among the messages before the answer", Preferences,
        ),
        ({"prompt": "a", "responses": [{"text": "b", "ids": [2**40]}]}, "'ids' must be a list of token ids", Files),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "hi"}, "'score_chosen' must be a number",
            Preferences,
        ),
    ],
)  # fmt: skip
def test_answers_under_other_names_and_contradictions_are_errors(record, words, kind, tmp_path):
    """Otherwise the written answer would be a turn of the prompt, and other answers would be sampled and train."""
    assert f"a.jsonl:1: {words}" in problem(tmp_path, "a.jsonl", lines(record), kind)


def test_result_of_a_tool_may_end_a_prompt(tmp_path):
    turns = [user("a"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}]
    (row,) = read_text(tmp_path, "a.jsonl", lines({"messages": turns}))
    assert (row.prompt[-1]["role"], row.responses) == ("tool", ())


def test_label_of_a_conversation_is_its_score(tmp_path):
    record = {"messages": [user("a"), assistant("b")], "label": False}
    assert shorten(read_text(tmp_path, "a.jsonl", lines(record))[0]) == ("a", [("b", 0.0)])
    for record in ({"reward": "2"}, {"reward": 3, "label": True, "score": 2}):
        rows = read_text(tmp_path / str(len(record)), "a.jsonl", lines({"prompt": "a", "response": "b", **record}))
        assert shorten(rows[0]) == ("a", [("b", 2.0)])
    record = {"prompt": "a", "completion": "b", "label": 1.0}  # as pandas writes a column with gaps
    assert shorten(read_text(tmp_path, "b.jsonl", lines(record))[0]) == ("a", [("b", 1.0)])


def test_columns_and_files_without_values_are_named(tmp_path):
    message = problem(tmp_path, "a.jsonl", lines({"prompt": "a", "response": None, "score": 1}))
    assert message.endswith("a.jsonl: 'response' has no value in any of the first records")
    assert problem(tmp_path, "empty.jsonl", "").splitlines()[1] == f"  {tmp_path}/empty.jsonl: it has no rows"
    message = problem(tmp_path, "a.jsonl", lines({"prompt": "a", "response": "b"}), columns="prompt")
    assert message.startswith("data.columns=prompt: expected our names of columns with the data's")


def test_messages_as_json_text_are_read_in_any_file(tmp_path):
    record = {"prompt": json.dumps([user("a")]), "response": json.dumps([assistant("b")])}
    rows = read_text(tmp_path, "a.jsonl", lines(record))
    assert shorten(rows[0]) == ("a", [("b", None)])
    assert rows.form.endswith("from the columns prompt as JSON, response as JSON")


def test_sharegpt_messages_are_read(tmp_path):
    """As a column of conversations, and in pairs. A turn of another kind is not guessed."""
    ask, reply = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": None}
    system = {"from": "system", "value": "s"}
    (row,) = read_text(tmp_path, "a.jsonl", lines({"conversations": [system, ask, reply]}))
    assert list(row.prompt) == [{"role": "system", "content": "s"}, user("a")]
    assert shorten(row) == ("a", [("b", None)])
    pair = {"prompt": [ask], "chosen": [reply], "rejected": [{"from": "gpt", "value": "c"}]}
    (row,) = read_text(tmp_path, "b.jsonl", lines(pair), Preferences)
    assert shorten(row) == ("a", [("b", None), ("c", None)])
    table = io.StringIO()
    csv.writer(table).writerows([["conversations"], [json.dumps([ask, reply])]])
    (row,) = read_text(tmp_path, "c.csv", table.getvalue())
    assert shorten(row) == ("a", [("b", None)])
    message = problem(tmp_path, "d.jsonl", lines({"conversations": [ask, {"from": "function_call", "value": "{}"}]}))
    assert "d.jsonl:1: 'from' must be one of human, user, gpt, assistant, system, tool, got 'function_call'" in message
