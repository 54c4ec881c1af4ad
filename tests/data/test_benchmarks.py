"""The files of AlpacaEval, Arena-Hard and MT-Bench become prompts with the baseline's answer; bad files are named."""

import json
from pathlib import Path

import pytest

from tests.helpers.benchmarks import write_alpaca_eval, write_arena_hard, write_mt_bench
from tests.helpers.runs import write_lines
from var.data.read import read
from var.data.row import Response
from var.data.rows import Rows
from var.data.sources.benchmarks import AlpacaEval, ArenaHard, Benchmark, MTBench
from var.utils.errors import UserError


def rows_of(source: Benchmark, folder: Path) -> Rows:
    return read(source, folder / "cache")


def error_of(source: Benchmark, folder: Path) -> list[str]:
    with pytest.raises(UserError) as error:
        rows_of(source, folder)
    return str(error.value).splitlines()


def test_alpaca_eval_has_the_baselines_outputs(tmp_path: Path):
    file = write_alpaca_eval(tmp_path / "alpaca_eval_gpt4_baseline.json")
    rows = rows_of(AlpacaEval(path=str(file)), tmp_path)
    assert len(rows) == 3
    assert rows[1].prompt == ({"role": "user", "content": "Name 1 birds."},)
    assert rows[1].responses == (Response(text="baseline 1", source="gpt4_1106_preview"),)
    assert rows[1].ordered
    assert rows[1].subset is None
    assert list(rows_of(AlpacaEval(path=str(tmp_path)), tmp_path)) == list(rows)
    assert rows.description == "prompts of AlpacaEval 2.0 with the answers of gpt4_1106_preview; 3 rows"


def test_only_rows_of_the_complete_file_have_the_instructions_numbers(tmp_path: Path):
    """The numbers find an instruction's difficulty, and a part of the file would have wrong ones."""
    for number, ids in ((805, ["0", "804"]), (804, ["part.json:row 1", "part.json:row 804"])):
        rows = rows_of(AlpacaEval(path=str(write_alpaca_eval(tmp_path / "part.json", number))), tmp_path)
        assert [rows[0].id, rows[number - 1].id] == ids


def test_outputs_of_another_baseline_are_an_error(tmp_path: Path):
    path = str(write_alpaca_eval(tmp_path / "alpaca_eval.json", generator="text_davinci_003"))
    assert error_of(AlpacaEval(path=path), tmp_path)[1] == (
        "  alpaca_eval.json:row 1: expected an output of data.source.baseline=gpt4_1106_preview, got "
        "'text_davinci_003'; also alpaca_eval.json:row 2, alpaca_eval.json:row 3"
    )
    assert len(rows_of(AlpacaEval(path=path, baseline="text_davinci_003"), tmp_path)) == 3


def test_empty_outputs_are_skipped_and_counted(tmp_path: Path):
    records = json.loads(write_alpaca_eval(tmp_path / "a.json").read_text())
    records[1]["output"] = ""
    (tmp_path / "a.json").write_text(json.dumps(records))
    rows = rows_of(AlpacaEval(path=str(tmp_path / "a.json")), tmp_path)
    assert (len(rows), rows.left_out) == (2, 1)


def test_old_and_new_files_of_arena_hard_give_equal_rows(tmp_path: Path):
    old, new = (write_arena_hard(tmp_path / name, new=name == "new") for name in ("old", "new"))
    rows = rows_of(ArenaHard(path=str(old)), tmp_path)
    assert [row.id for row in rows] == ["q0", "q1", "q2"]
    assert rows[2].prompt == ({"role": "user", "content": "Count 2 birds."},)
    assert rows[2].responses == (Response(text="baseline 2", source="gpt-4-0314"),)
    assert rows[2].subset == "arena-hard-v0.1"
    assert list(rows) == list(rows_of(ArenaHard(path=str(new)), tmp_path))
    assert list(rows) == list(rows_of(ArenaHard(path=str(new / "question.jsonl")), tmp_path))


def test_first_turns_of_mt_bench_are_used_by_category(tmp_path: Path):
    rows = rows_of(MTBench(path=str(write_mt_bench(tmp_path / "mt"))), tmp_path)
    assert [(row.id, row.subset) for row in rows] == [("81", "writing"), ("82", "math"), ("83", "writing")]
    assert [[message["content"] for message in row.prompt] for row in rows] == [[f"Draw {i} birds."] for i in range(3)]
    assert [row.responses[0].text for row in rows] == ["baseline 0", "baseline 1", "baseline 2"]
    assert rows.description == (
        "prompts of MT-Bench with the answers of gpt-3.5-turbo; only the first turn of each question is used, not the "
        "second; 3 rows"
    )


def test_one_error_lists_all_questions_and_answers_that_do_not_match(tmp_path: Path):
    """q0: without an answer. q1: two answers. q2: without a category. q3: an answer without a text. q4: a second
    question with its id. q9: an answer without a question. At the end of both files, a line that is cut off."""
    folder = write_arena_hard(tmp_path / "arena", 5)
    answers, questions = folder / "model_answer" / "gpt-4-0314.jsonl", folder / "question.jsonl"
    replies = {record["question_id"]: record for record in map(json.loads, answers.read_text().splitlines())}
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    del asked[2]["category"]
    replies["q3"]["choices"][0]["turns"] = [{"content": None}]
    stray = {**replies.pop("q0"), "question_id": "q9"}
    write_lines(answers, [*replies.values(), replies["q1"], stray])
    write_lines(questions, [*asked, asked[4]])
    for file in (answers, questions):
        file.write_text(file.read_text() + '{"question_id": "q7", ')
    assert error_of(ArenaHard(path=str(folder)), tmp_path) == [
        "ArenaHard: invalid rows (8):",
        "  question.jsonl:1: model_answer/gpt-4-0314.jsonl has no answer to it (row q0)",
        "  question.jsonl:2: model_answer/gpt-4-0314.jsonl has several answers to it, got gpt-4-0314.jsonl:4, "
        "gpt-4-0314.jsonl:5",
        "  question.jsonl:3: missing 'category'",
        "  question.jsonl:4: its answer in gpt-4-0314.jsonl:2 cannot be read: expected a text, got None",
        "  question.jsonl:7: not JSON: Expecting property name enclosed in double quotes at column 23; also "
        "gpt-4-0314.jsonl:7",
        "  gpt-4-0314.jsonl:6: its question is not in question.jsonl (row q9)",
        "  question.jsonl:6: id 'q4' is also the id of question.jsonl:5",
        "Set data.path to a folder with question.jsonl and model_answer/gpt-4-0314.jsonl of Arena-Hard 0.1, or to null "
        "to read the hub's lmarena-ai/arena-hard-auto. data.source.baseline names the model whose answers are read.",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda path: ArenaHard(path=f"{path}/mt", baseline="gpt-3.5-turbo"),
         "not a question of Arena-Hard 0.1: expected the category arena-hard-v0.1, got 'writing'"),
        (lambda path: MTBench(path=f"{path}/arena", baseline="gpt-4-0314"), "not a question of MT-Bench: expected"),
        (lambda path: AlpacaEval(path=f"{path}/arena/question.jsonl"), "missing 'generator'"),
        (lambda path: ArenaHard(path=f"{path}/alpaca.json"), "no such file: "),
        (lambda path: AlpacaEval(path=f"{path}/nowhere"), "no such file: "),
        (lambda path: MTBench(path=f"{path}/mt", baseline="gpt-4"), "mt/model_answer/gpt-4.jsonl. Set data.path to a"),
        (lambda path: MTBench(path=f"{path}/mt", revision="main"), "data.source.revision applies to hub sets only"),
    ],
)  # fmt: skip
def test_files_of_another_benchmark_are_an_error(source, message: str, tmp_path: Path):
    write_mt_bench(tmp_path / "mt")
    write_arena_hard(tmp_path / "arena")
    write_alpaca_eval(tmp_path / "alpaca.json")
    assert message in "\n".join(error_of(source(tmp_path), tmp_path))


def test_questions_with_another_number_of_turns_are_an_error(tmp_path: Path):
    folder = write_mt_bench(tmp_path / "mt")
    record = json.loads((folder / "question.jsonl").read_text().splitlines()[0])
    write_lines(folder / "question.jsonl", [{**record, "turns": record["turns"][:1]}])
    assert "question.jsonl:1: number of turns: expected 2, got 1" in error_of(MTBench(path=str(folder)), tmp_path)[1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": [{"turns": ["a", "b"]}] * 2}, "expected one choice, got 2"),
        ({"choices": [{"turns": []}]}, "it has no turn of the assistant"),
        ({"messages": [{"role": "user", "content": "Draw 0 birds."}]}, "it has no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": {"text": "a"}}]}, "missing 'answer'"),
        ({}, "missing 'messages'"),
    ],
)
def test_answer_without_one_text_is_an_error(answer, message: str, tmp_path: Path):
    folder = write_mt_bench(tmp_path / "mt", 1)
    write_lines(folder / "model_answer" / "gpt-3.5-turbo.jsonl", [{"question_id": 81, **answer}])
    found = error_of(MTBench(path=str(folder)), tmp_path)
    assert found[1].endswith(f"its answer in gpt-3.5-turbo.jsonl:1 cannot be read: {message}")
