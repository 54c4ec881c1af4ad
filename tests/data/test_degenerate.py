"""Degenerate rows are counted, and a warning is printed where they are likely a mistake."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import composed, write_lines
from var.config.run_files import read_run_config
from var.data import degenerate
from var.data.degenerate import count_degenerate, warn_of_degenerate
from var.data.parse import parse_row
from var.data.read import read
from var.data.row import Row, find_degenerate
from var.data.sources.files import Files
from var.evaluate.prompts import Prompts, warn_of_trained_prompts
from var.training.run import Run

CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


def make(*responses: Any, ordered: bool = False, prompt: Any = "q", id: str = "a") -> Row:
    return parse_row({"id": id, "prompt": prompt, "responses": list(responses), "ordered": ordered})


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (make("a", "b"), []),
        (make("a", "b", " a\n"), ["rows with a repeated response"]),
        (make(CALL, CALL), ["rows with a repeated response"]),
        (make(CALL, {**CALL, "tool_calls": [{"type": "function", "function": {"name": "g"}}]}), []),
        (make("a", "b", "a", ordered=True), ["rows with a repeated response", "pairs of equal responses"]),
        (make({"text": "a", "score": 1}, {"text": "b", "score": 1}, ordered=True), ["pairs with equal scores"]),
        (make({"text": "a", "score": 1}, {"text": "b", "score": 1}), []),
        (make({"text": "a", "score": 0}, {"text": "b", "score": 1}, ordered=True),
         ["pairs whose rejected response has the higher score"]),
        (make({"text": "a", "score": 1}, {"text": "b", "score": 0}, ordered=True), []),
        (make("<|im_end|>", "b"), ["rows with a response of control tokens only"]),
        (make("</s>\n</s>"), ["rows with a response of control tokens only"]),
        (make("[END]"), ["rows with a response of control tokens only"]),
        (make("a <|im_end|>"), []),
        (make("<b>"), []),
    ],
)  # fmt: skip
def test_kinds_of_degenerate_rows(row: Row, kinds: list[str]) -> None:
    assert list(find_degenerate(row, ["[END]"])) == kinds


def test_validation_prompts_that_differ_by_case_and_spaces_are_counted(tmp_path: Path) -> None:
    """Each once. Prompts with other earlier turns or other letters are different ones."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is it?"}]
    train = [("a", "what  is\nIT?"), ("b", "WHAT is it?"), ("c", "What is that?"), ("d", turns)]
    held_out = [("e", "What is it?"), ("f", "What is this?")]
    rows = [
        read(Files(path=str(write_lines(tmp_path / f"{i}.jsonl", [{"id": k, "prompt": p} for k, p in part]))), tmp_path)
        for i, part in enumerate((train, held_out))
    ]
    assert count_degenerate(rows[0], rows[1], [], True) == {degenerate.SHARED: 1}


@pytest.mark.parametrize("sampled", [True, False])
def test_prompts_of_several_rows_are_counted_if_responses_are_sampled(sampled: bool, tmp_path: Path) -> None:
    """The random numbers depend on the prompt, so equal prompts have equal samples."""
    lines = [{"id": k, "prompt": p} for k, p in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "x"))]
    rows = read(Files(path=str(write_lines(tmp_path / "a.jsonl", lines))), tmp_path)
    assert count_degenerate(rows, rows.select([]), [], sampled) == ({degenerate.SAME_PROMPT: 2} if sampled else {})


def test_warning_is_printed_above_a_fraction(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_degenerate(degenerate.Counter({degenerate.EQUAL_SCORES: 10, degenerate.ONLY_END: 1}), 100)
    assert capsys.readouterr().out == (
        "Warning: rows with a response of control tokens only: 1 of 100 rows. They teach the model to answer with "
        "nothing.\n"
    )
    warn_of_degenerate(degenerate.Counter({degenerate.EQUAL_SCORES: 11}), 100)
    assert "Warning: pairs with equal scores: 11 of 100 rows." in capsys.readouterr().out


def prepare(options: list[str], folder: Path, records: list[dict[str, Any]], *more: str) -> Run:
    file = write_lines(folder / "own.jsonl", records)
    run = Run.compose(composed(*options, f"data.path={file}", *more), folder)
    run.data.prepare()
    return run


@pytest.mark.parametrize(("label", "kind"), [(True, "desirable"), (False, "undesirable")])
def test_kto_warns_of_labels_of_one_kind(label, kind, options, tmp_path, capsys):
    records = [{"prompt": f"q{i}", "completion": "a" * (i + 1), "label": label} for i in range(4)]
    kto = ("loss=kto", "loss.threshold=0.5", "data.micro_batch=2", "data.global_batch=2")
    run = prepare(options, tmp_path, records, *kto)
    assert run.data.report.desirable_sequences == 4 * label
    assert f"Warning: all 4 responses are {kind}" in capsys.readouterr().out
    records[0]["label"] = not label
    assert prepare(options, tmp_path, records, *kto).data.report.desirable_sequences == (3 if label else 1)
    assert "responses are" not in capsys.readouterr().out


def test_groups_of_one_are_counted_where_a_loss_compares_responses(options, tmp_path, capsys):
    sizes = [(f"q{i}", k) for i, size in enumerate((1, 3, 2, 1)) for k in range(1, size + 1)]
    records = [{"prompt": prompt, "response": "a" * k, "score": k} for prompt, k in sizes]
    run = prepare(options, tmp_path, records, "loss=infonca", "data.micro_batch=2", "data.global_batch=2")
    report = run.data.report
    assert (report.rows, report.records_joined, report.groups, report.groups_of_one) == (4, 3, 4, 2)
    printed = capsys.readouterr().out
    assert "Warning: 2 of 4 prompts have one response, and this loss compares the responses" in printed
    assert (
        "Data: own.jsonl: one response per record, from the columns prompt, response, score; 4 rows, 3 rec" in printed
    )


def test_pairs_with_equal_rewards_are_counted(options, tmp_path, capsys):
    records = [
        {"prompt": f"q{i}", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": i % 2}
        for i in range(4)
    ]
    run = prepare(options, tmp_path, records, "loss=bradley_terry", "loss.margin=1.0", "data.micro_batch=2",
                  "data.global_batch=2", "eval=off")  # fmt: skip
    assert run.data.report.pairs_with_equal_rewards == 2
    assert run.data.report.degenerate == {"pairs with equal scores": 2}
    assert "Warning: 2 of 4 pairs have equal rewards" in capsys.readouterr().out


def test_invalid_rows_are_errors_before_a_model_is_loaded(options, tmp_path, monkeypatch):
    """Also before the model's files are hashed."""
    file = write_lines(tmp_path / "own.jsonl", [{"prompt": "q", "response": ""}])
    monkeypatch.setattr("var.models.pretrained.Pretrained.load", lambda self: pytest.fail("the model was loaded"))
    monkeypatch.setattr("var.models.pretrained.Pretrained.hash_files", lambda *_: pytest.fail("its files were read"))
    run = Run.compose(composed(*options, f"data.path={file}"), tmp_path)
    for read_rows in (run.data.read_rows, run.data.prepare):
        with pytest.raises(ValueError, match="response 0 is empty"):
            read_rows()


def test_evaluation_warns_of_prompts_that_the_run_trained_on(options, tmp_path, capsys):
    from omegaconf import OmegaConf

    file = write_lines(tmp_path / "own.jsonl", [{"prompt": f"Q {i}", "response": "a"} for i in range(6)])
    cfg = composed(*options, f"data.path={file}", "data.validation_prompts=2")
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    config = read_run_config(tmp_path)
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": f"q  {i}"} for i in range(7)])
    rows = read(Files(path=str(other)), tmp_path)
    warn_of_trained_prompts(Prompts(rows, None, {}), config, tmp_path)  # type: ignore[arg-type]
    assert "Warning: 4 of 7 prompts are also training prompts" in capsys.readouterr().out
    file.unlink()
    warn_of_trained_prompts(Prompts(rows, None, {}), config, tmp_path)  # type: ignore[arg-type]
    assert "Not compared with the run's training prompts" in capsys.readouterr().out


def test_a_long_response_of_control_tokens_is_counted(tmp_path: Path) -> None:
    records = [{"prompt": "q", "responses": ["</s>" * 80]}, {"prompt": "r", "responses": ["- a list"]}]
    rows = read(Files(path=str(write_lines(tmp_path / "rows.jsonl", records))), tmp_path)
    assert count_degenerate(rows, rows.select([]), [], False) == {degenerate.ONLY_END: 1}
