"""What eval.py refuses before anything is loaded, what it warns of, and its closing table."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.runs import composed
from var.evaluate import measures as evaluation
from var.evaluate.judges.base import Judgement
from var.evaluate.run import Evaluation
from var.utils.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ["prompts=0", "judged=-1", "seed=-1", "init=", "answers=", "reference="],
            [
                "prompts: must be at least 1, or null for all, got 0",
                "judged: must be at least 1, or null for all, got -1",
                "seed: must be at least 0, got -1", "init: is empty", "answers: is empty", "reference: is empty",
            ],
        ),
        (["averages=3", "more=3"], ["averages: lists of subsets by name, got 3", "more: further data sets by name"]),
        (["+averages.x=a", "+more.x=3"], ["averages: lists of subsets by name", "more: further data sets by name"]),
        (["averages=null"], ["averages: lists of subsets by name, got None"]),
        (["generate.seed=5"], ["generate.seed: nothing reads it here: seeds has the seeds of sampling"]),
        (["reference=nowhere"], ["reference=nowhere is neither a finished run"]),
        (["init=nowhere"], ["init=nowhere is neither a finished run"]),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_told_at_once(tmp_path: Path, overrides: list[str], lines: list[str]) -> None:
    cfg = composed(f"annotation_cache={tmp_path}/s", f"cache={tmp_path}/c", *overrides, root="eval")
    with pytest.raises(UserError) as error:
        Evaluation.compose(cfg)
    assert [line for line in lines if line not in str(error.value)] == []


def test_another_seed_is_the_samplings_too(tmp_path: Path) -> None:
    Evaluation.compose(
        composed(f"annotation_cache={tmp_path}/s", f"cache={tmp_path}/c", "seed=3", "prompts=1", root="eval")
    )


def verdicts(judge: Any, seeds: int = 1) -> dict[str, Any]:
    row = SimpleNamespace(id="a", prompt=({"role": "user", "content": "?"},), answer=None)
    judge.describe = lambda pairs: "one"
    texts = [[("x", True)] * seeds]
    return evaluation.judged(judge, [row], np.array(["s"]), texts, texts, None, range(seeds))[0]  # type: ignore[arg-type]


class Judge(SimpleNamespace):
    def __call__(self, pairs: Any, advance: Any) -> Judgement:
        return Judgement(self.outcomes, np.array(self.scores), [], {"max_errors": 0.05, **self.facts}, self.counts)


def test_the_closing_table_has_the_protocols_win_rate_and_the_length_controlled_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three equal pairs of Arena-Hard are 50 %, though none is won."""
    judge = Judge(
        outcomes=["tie"], scores=[0.5], counts=[[0.5, 0.5]], facts={"lc_win_rate": 44.4444, "lc_se": 1.25}
    )  # fmt: skip
    part = {"reward": {"mean": 1.0, "se_prompts": None}, "length": {"mean": 2.0, "se": 0.5}, "cut": 0.0}
    result = {"title": "t", "model": {"subsets": {"s": part}, "averages": {}}, "win_rates": verdicts(judge)}
    Evaluation.show(SimpleNamespace(cfg=SimpleNamespace(against="reference"), folder=tmp_path), result)  # type: ignore[arg-type]
    rows = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "win rate in %, against reference 50.000" in rows
    assert "length-controlled win rate in % 44.444 ± 1.250" in rows


def test_why_there_is_no_win_rate_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"errors": {"failed": 1}, "first_failure": "400: no model"}
    verdicts(Judge(outcomes=["error"], scores=[np.nan], counts=None, facts=facts))
    printed = capsys.readouterr().out
    assert "Warning: no win rate by the judge: 1 of 1 pairs are in error" in printed
    assert "The first that failed: 400: no model" in printed
    verdicts(Judge(outcomes=["win"], scores=[1.0], counts=None, facts={"lc_win_rate": None, "lc_reason": "alike"}))
    assert "Warning: no length-controlled win rate: alike" in capsys.readouterr().out


def test_half_a_surrogate_pair_is_written_as_a_question_mark(tmp_path: Path) -> None:
    """Whatever has been paid for is kept: an endpoint's answer may hold one."""
    Evaluation._lines(SimpleNamespace(folder=tmp_path), "answers.jsonl", [{"text": "a \ud83d"}])  # type: ignore[arg-type]
    assert json.loads((tmp_path / "answers.jsonl").read_text()) == {"text": "a ?"}
