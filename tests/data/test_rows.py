"""Rows: all invalid records in one error, and the files that reading leaves on disk."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from var.data import rows as rows_module
from var.data.parse import parse_row
from var.data.read import read
from var.data.row import Response, Row
from var.data.rows import load, write
from var.utils.errors import Problems, UserError
from var.utils.provenance import hash_content


@dataclass
class ListSource:
    """A source of the given records that counts how often it is read."""

    given: list[Any]
    reads: int = 0

    def records(self) -> Iterator[tuple[str, Any]]:
        self.reads += 1
        for i, record in enumerate(self.given):
            yield f"file.jsonl:{i + 1}", record

    def row(self, where: str, record: Any) -> Row | None:
        return None if record == "skip" else parse_row(record)

    def fingerprint(self) -> dict[str, Any]:
        return {"records": self.given}


def record(id: str, *responses: Any, **fields: Any) -> dict[str, Any]:
    return {"id": id, "prompt": "q", "responses": list(responses), **fields}


def test_rows_are_read_back_unchanged(tmp_path: Path):
    rows = read(
        ListSource(
            [
                record("a", "one", "two", ordered=True),
                "skip",
                {
                    "id": "b",
                    "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "ü\n"}],
                    "responses": [{"text": "three", "score": 2, "weight": 0.5, "source": "x", "finished": False}],
                    "answer": "7",
                },
            ]
        ),
        tmp_path,
    )
    assert (len(rows), rows.left_out) == (2, 1)
    assert rows[0] == Row(
        id="a",
        prompt=({"role": "user", "content": "q"},),
        responses=(Response(text="one"), Response(text="two")),
        ordered=True,
    )
    assert rows[1].responses == (Response(text="three", score=2.0, weight=0.5, source="x", finished=False),)
    assert (rows[1].prompt[1]["content"], rows[1].answer) == ("ü\n", "7")
    assert [row.id for row in rows.select(np.array([1, 0]))] == ["b", "a"]


def test_one_error_lists_all_invalid_records(tmp_path: Path):
    source = ListSource(
        [
            record("good", "fine"),
            {"prompt": "q"},
            "not an object",
            record("empty", " \n"),
            record("nan", {"text": "x", "score": float("nan")}),
            record("weight", {"text": "x", "weight": -1.0}),
            record("good", "an id twice"),
            record("typo", "x", respones=[]),
            {"id": "turn", "prompt": [{"role": "assistant", "content": "x"}]},
            record("half", "a\ud800"),
            record("word", {"text": "x", "score": "high"}),
            {
                **record("blank", "x"),
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": " \u00a0"}],
            },
            record("missing", "x", answer=float("nan")),
            record("infinite", "x", answer=float("inf")),
            record("object", "x", answer={"a": 1}),
            record("list", "x", answer=["4"]),
            record("part", "x", subset=float("nan")),
            {**record("text"), "responses": "yes"},
            record("false", "x", ordered="no"),
        ]
    )
    with pytest.raises(UserError) as error:
        read(source, tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == "ListSource: invalid rows (18):"
    expected = {
        2: "'id' must be text or an integer", 3: "a row must be an object", 4: "response 0 is empty (row empty)",
        5: "the score of response 0 is nan", 6: "weights must be finite and ≥ 0",
        8: "unknown keys ['respones']", 9: "the prompt ends with an assistant's message",
        10: "unpaired surrogate '\\ud800'", 11: "'score' must be a number, got 'high'",
        12: "its prompt is empty (row blank)",
        13: "or null, got nan; also file.jsonl:14, file.jsonl:15, file.jsonl:16",
        17: "'subset' must be text, a finite number or null, got nan", 18: "'responses' must be a list, got 'yes'",
        19: "'ordered' must be true or false, got 'no'", 7: "is also the id of file.jsonl:1",
    }  # fmt: skip
    for line, (number, text) in zip(lines[1:], expected.items(), strict=True):
        assert line.startswith(f"  file.jsonl:{number}: ")
        assert text in line


def test_problems_of_one_kind_are_listed_once(tmp_path: Path):
    with pytest.raises(UserError) as error:
        read(ListSource([record(str(i), "") for i in range(25)]), tmp_path)
    assert "invalid rows (25):" in str(error.value)
    assert str(error.value).endswith(
        "  file.jsonl:1: response 0 is empty (row 0); also file.jsonl:2, file.jsonl:3, file.jsonl:4 and 21 more"
    )


@pytest.mark.parametrize("given", [[record("bad", "")], [record("a", "x"), record("b", "")], [], ["skip"]])
def test_failed_read_leaves_no_files(given: list[Any], tmp_path: Path):
    """The next run raises the same error."""
    for _ in range(2):
        with pytest.raises(UserError):
            read(ListSource(given), tmp_path)
        assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["lock"]


def test_interrupted_write_leaves_no_files(tmp_path: Path):
    def rows() -> Iterator[Row]:
        yield Row(id="a", prompt=({"role": "user", "content": "q"},))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write(rows(), tmp_path / "rows", Problems("rows"))
    assert not list((tmp_path / "rows").iterdir())


def test_second_read_uses_the_cache(tmp_path: Path):
    source = ListSource([record("a", "x"), record("b", "y"), "skip"])
    first, second = read(source, tmp_path), read(source, tmp_path)
    assert source.reads == 1
    assert (list(first), first.left_out) == (list(second), second.left_out)
    assert first.keys.tolist() == second.keys.tolist()
    (folder,) = (tmp_path / "rows").iterdir()
    assert len(load(folder)) == 2
    assert second.table.cache_files[0]["filename"] == str(folder / "rows.arrow")  # a memory map, not a copy


def test_changed_fingerprint_is_read_again(tmp_path: Path):
    read(ListSource([record("a", "x")]), tmp_path)
    assert read(ListSource([record("a", "other")]), tmp_path)[0].responses[0].text == "other"


def test_numeric_answers_become_text(tmp_path: Path):
    given = [4, 0.5, "4", True, None, 10**400]
    rows = read(ListSource([record(str(i), "x", answer=answer) for i, answer in enumerate(given)]), tmp_path)
    assert [row.answer for row in rows] == ["4", "0.5", "4", "True", None, "1" + "0" * 400]
    with pytest.raises(ValueError, match=r"'answer' must be text, a finite number or null, got b'4'"):
        parse_row(record("a", answer=b"4"))


def test_empty_earlier_turn_is_valid(tmp_path: Path):
    """HHA has such rows."""
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", ""), ("user", "r"))]
    assert len(read(ListSource([{"id": "a", "prompt": turns}]), tmp_path)) == 1


def test_row_is_decoded_once_for_all_its_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows are accessed once per response and per pair of rows."""
    rows = read(ListSource([record(str(i), *"abcd") for i in range(8)]), tmp_path)
    decoded, real = list[str](), rows_module._load_row
    monkeypatch.setattr(rows_module, "_load_row", lambda record: decoded.append(record["id"]) or real(record))
    for i in range(8):
        for j in range(8):
            for k in range(4):
                assert rows[np.int64(j)].responses[k].text == "abcd"[k]
                assert rows[i].id == str(i)
    assert sorted(decoded) == list("01234567")


def test_few_decoded_rows_are_cached(tmp_path: Path):
    rows = read(ListSource([record(str(i), "x") for i in range(50)]), tmp_path)
    assert [rows[i].id for i in range(50)] == [row.id for row in rows]
    assert len(rows._decoded) <= 16


def test_equal_prompts_have_equal_keys(tmp_path: Path):
    rows = read(ListSource([record("a", "x"), record("b", "y"), {**record("c", "z"), "prompt": "r"}]), tmp_path)
    assert rows.keys[0] == rows.keys[1] != rows.keys[2]
    assert bytes(rows.keys[0]).ljust(16, b"\0") == hash_content(rows[0].prompt)


def test_content_hash_uses_canonical_json():
    """The order of keys does not matter; the order and boundaries of the parts do."""
    assert hash_content({"a": 1, "b": "ü"}) == hash_content({"b": "ü", "a": 1})
    assert hash_content("ab", "c") != hash_content("a", "bc")
    assert hash_content(1, 2) != hash_content(2, 1)
    text = json.dumps([["x", 1]], separators=(",", ":")).encode()
    assert hash_content(["x", 1]) == hashlib.sha256(text).digest()[:16]
    assert len(hash_content("\ud800")) == 16  # an invalid text must have a hash to be reported
