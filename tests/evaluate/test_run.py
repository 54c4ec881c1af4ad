"""Settings that eval.py rejects before anything is loaded, its warnings, and its closing table."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from notebooks.tiny import byte_tokenizer
from tests.helpers.judges import pair
from tests.helpers.models import DATED, saved, tiny_model
from tests.helpers.runs import composed
from var.config.saved import to_saved
from var.evaluate.judges.base import Judgement, judge_pairs
from var.evaluate.prompts import warn_of_trained_prompts
from var.evaluate.run import Evaluation, locate_models
from var.evaluate.settings import say_differences
from var.evaluate.table import print_result
from var.utils.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ["prompts=0", "judged=-1", "seed=-1", "init=", "answers=", "reference="],
            [
                "prompts: expected at least 1, or null for all, got 0",
                "judged: expected at least 1, or null for all, got -1",
                "seed: expected at least 0, got -1", "init: is empty", "answers: is empty", "reference: is empty",
            ],
        ),
        (["averages=3", "more=3"], ["averages: expected lists of subsets by name, got 3", "more: expected data sets"]),
        (["+averages.x=a", "+more.x=3"], ["averages: expected lists of subsets by name", "more: expected data sets"]),
        (["averages=null"], ["averages: expected lists of subsets by name, got None"]),
        (["generate.seed=5"], ["generate.seed: has no effect here. Set seeds."]),
        (["generate.temperature=0"], ["seeds: at temperature 0 all seeds give the same answers"]),
        (["seeds=[0,-1]"], ["seeds: expected numbers of at least 0, got [0, -1]"]),
        (["seeds=[0,0]"], ["seeds: expected one or more different numbers, got [0, 0]"]),
        (["generate.responses=2"], ["generate.responses: one answer is sampled per prompt and seed"]),
        (["held_out=[other]"], ["held_out: there is no data set ['other']"]),
        (["+data@more.x=arithmetic"], ["more: data sets must have different names"]),
        (["answers=a.jsonl", "init=runs/x"], ["init: has no effect with answers="]),
        (["answers=a.jsonl", "benchmarks=local", "benchmarks.folder=x"], ["benchmarks: need a model"]),
        (["reference=nowhere"], ["reference=nowhere"]),
        (["init=nowhere"], ["init=nowhere"]),
        (["reward=none", "+reward@second_reward=near_number"], ["reward: none is set, but second_reward is"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_rejected(tmp_path: Path, overrides: list[str], lines: list[str]) -> None:
    cfg = composed(f"annotation_cache={tmp_path}/s", f"cache={tmp_path}/c", *overrides, root="eval")
    with pytest.raises(UserError) as error:
        Evaluation.compose(cfg)
    assert [line for line in lines if line not in str(error.value)] == []


def test_settings_that_differ_from_training_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's configuration is that of `python train.py`; parts that it lacks are not compared."""
    trained = to_saved(composed())
    options = [f"annotation_cache={tmp_path}/s", f"cache={tmp_path}/c"]
    say_differences(composed(*options, root="eval"), trained)
    say_differences(composed(*options, "reward=none", root="eval"), {"data": {}})
    assert capsys.readouterr().out == ""
    changes = "generate.max_new_tokens=99", "data=files", "data.path=x.jsonl", "reward=near_number"
    say_differences(composed(*options, *changes, root="eval"), trained)
    line = " ".join(capsys.readouterr().out.split())
    assert line == (
        "Not as in the run's own evaluation: "
        "data.source Arithmetic → Files, reward ExactNumber → NearNumber, generate.max_new_tokens 20 → 99"
    )


def test_seed_also_sets_the_sampling_seed(tmp_path: Path) -> None:
    options = f"annotation_cache={tmp_path}/s", f"cache={tmp_path}/c", "seed=3", "prompts=1"
    Evaluation.compose(composed(*options, root="eval"))


def test_prompts_have_the_date_and_the_template_arguments_of_the_run(tmp_path: Path) -> None:
    """For the model and the reference. The command line has priority, and a model without a run has neither."""
    template = DATED.replace("'<assistant>'", "'<assistant>' + ('' if enable_thinking | default(true) else '()')")
    folder = saved(tmp_path / "run" / "model", tokenizer=byte_tokenizer(template))
    options = ["model=hub", f"model.path={folder}", f"init={tmp_path}/run", f"cache={tmp_path}/c"]

    def render(*more: str) -> list[str]:
        models = locate_models(composed(*options, *more, root="eval"))
        return [model.chat.render([{"role": "user", "content": "a"}]) for model in models if model]

    plain = "<user>a<end><assistant>"
    fixed = f"<bos><system>02 Jan 2025<end>{plain}"
    assert render("model.date=2025-01-02") == [fixed] * 2
    model = {"date": "2024-07-26", "chat_template_kwargs": {"enable_thinking": False}}
    OmegaConf.save({"model": model, "init": None}, folder / "config.yaml")
    assert render() == [f"<bos><system>26 Jul 2024<end>{plain}()"] * 2
    assert render("model.date=2025-01-02", "+model.chat_template_kwargs.enable_thinking=true") == [fixed] * 2


def test_comparison_with_another_model_than_the_initial_one_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started, other = saved(tmp_path / "started"), saved(tmp_path / "other", tiny_model(seed=1))
    trained = saved(tmp_path / "run" / "model")
    common = [
        f"init={trained.parent}",
        "model=hub",
        f"cache={tmp_path}/c",
        f"annotation_cache={tmp_path}/s",
        "prompts=1",
    ]
    for path, warned in ((started, False), (other, True)):
        weights = locate_models(composed(*common, f"model.path={started}", root="eval"))[1].weights  # type: ignore[union-attr]
        (trained.parent / "summary.json").write_text(json.dumps({"hashes": {"weights": weights}}))
        capsys.readouterr()
        Evaluation.compose(composed(*common, f"model.path={path}", root="eval"))
        assert ("did not start from" in " ".join(capsys.readouterr().out.split())) == warned


def test_settings_from_the_environment_have_to_be_given_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run does not save their values."""
    folder, text = saved(tmp_path / "run" / "model"), "${oc.env:MY_THING} (3f1a)"
    options = ["model=hub", f"model.path={folder}", f"init={tmp_path}/run", f"cache={tmp_path}/c"]
    cfg = composed(*options, root="eval")
    OmegaConf.save({"init": text}, folder / "config.yaml")
    with pytest.raises(UserError, match=r"does not name the initial model of this run.* Set reference to its folder"):
        locate_models(cfg)
    assert locate_models(composed(*options, "reference=null", root="eval"))[1] is None
    OmegaConf.save({"model": {"chat_template_kwargs": {"x": text}}}, folder / "config.yaml")
    with pytest.raises(UserError, match=r"^model\.chat_template_kwargs\.x: its value in training came from the env"):
        locate_models(cfg)
    warn_of_trained_prompts(None, {"data": {"source": {"path": text}}}, tmp_path)  # type: ignore[arg-type]
    assert "data.source.path came from the environment" in capsys.readouterr().out


class Judge(SimpleNamespace):
    def describe(self, pairs: Any) -> str:
        return "one call"

    def __call__(self, pairs: Any, advance: Any) -> Judgement:
        return Judgement(self.outcomes, np.array(self.scores), [], {"max_errors": 0.05, **self.facts}, self.counts)


def test_closing_table_has_the_win_rates(capsys: pytest.CaptureFixture[str]) -> None:
    """One equal pair of Arena-Hard is 50 %, though it is not won."""
    judge = Judge(outcomes=["tie"], scores=[0.5], counts=[[0.5, 0.5]], facts={"lc_win_rate": 44.4444, "lc_se": 1.25})
    part = {"reward": {"mean": 1.0, "se_prompts": None}, "length": {"mean": 2.0, "se": 0.5}, "truncated": 0.0}
    rates = judge_pairs(judge, [pair("a", "s")])[0]
    print_result({"title": "t", "model": {"subsets": {"s": part}, "averages": {}}, "win_rates": rates}, "reference")
    rows = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    for row in (
        "s: reward – 1.000", "s: length – 2.000 ± 0.500", "s: truncation rate – 0.00",
        "win rate in %, against reference – 50.000", "length-controlled win rate in % – 44.444 ± 1.250",
    ):  # fmt: skip
        assert row in rows


def test_judge_that_prefers_a_position_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"inconsistent": 1, "first_shown_wins": 1.0}
    judge_pairs(Judge(outcomes=["tie"], scores=[0.5], counts=None, facts=facts), [pair("a", "s")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "0 won, 1 tied, 0 lost, 0 without a verdict" in printed
    assert "verdict on 1 of 1 pairs depends on which answer it is shown first (the first wins 100% of" in printed
    facts = {"inconsistent": 1, "first_shown_wins": 0.5}
    judge_pairs(Judge(outcomes=["win"] * 2, scores=[1.0] * 2, counts=None, facts=facts), [pair("a", "s")] * 2)
    assert "Warning" not in capsys.readouterr().out


def test_missing_win_rate_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"errors": {"failed": 1}, "first_failure": "400: no model"}
    judge_pairs(Judge(outcomes=["error"], scores=[np.nan], counts=None, facts=facts), [pair("a", "s")])
    printed = capsys.readouterr().out
    assert "Warning: no win rate by the judge: 1 of 1 pairs are in error" in printed
    assert "First failure: 400: no model" in printed
    facts = {"lc_win_rate": None, "lc_reason": "alike"}
    judge_pairs(Judge(outcomes=["win"], scores=[1.0], counts=None, facts=facts), [pair("a", "s")])
    assert "Warning: no length-controlled win rate: alike" in capsys.readouterr().out


def test_lone_surrogate_is_written_as_a_question_mark(tmp_path: Path) -> None:
    """An endpoint's answer may hold one, and paid answers must not be lost."""
    Evaluation._write_lines(SimpleNamespace(folder=tmp_path), "answers.jsonl", [{"text": "a \ud83d"}])  # type: ignore[arg-type]
    assert json.loads((tmp_path / "answers.jsonl").read_text()) == {"text": "a ?"}
