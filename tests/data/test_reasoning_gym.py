"""Problems of the package reasoning-gym as rows, and errors of tasks and options."""

import ast
import json
import sys
from importlib.metadata import version

import pytest
from hydra.utils import instantiate

from tests.helpers.runs import composed
from var.data.read import read
from var.data.sources.reasoning_gym import ReasoningGym, read_problem, write_problem
from var.utils.errors import UserError

reasoning_gym = pytest.importorskip("reasoning_gym")


def test_rows_equal_the_problems_of_the_package(tmp_path):
    rows = read(ReasoningGym(task="gcd", size=6, seed=3, options={"max_value": 30}), tmp_path)
    own = reasoning_gym.create_dataset("gcd", size=6, seed=3, max_value=30)
    assert [row.id for row in rows] == [f"gcd-{i}" for i in range(6)]
    for row, problem in zip(rows, own, strict=True):
        assert row.prompt == ({"role": "user", "content": problem["question"]},)
        assert read_problem(row.answer) == {"task": "gcd", "options": {"max_value": 30}, **problem}
        assert row.responses == ()


def test_repeated_questions_are_left_out_and_counted(tmp_path):
    """Products of two one-digit numbers have at most 100 questions."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    rows = read(ReasoningGym(task="products", size=400, options=options), tmp_path)
    questions = [row.prompt[0]["content"] for row in rows]
    assert len(set(questions)) == len(questions) == 400 - rows.left_out
    assert 50 < len(rows) <= 100


def test_fingerprint_depends_on_settings_and_package_version():
    sources = [
        ReasoningGym(), ReasoningGym(task="gcd"), ReasoningGym(size=9), ReasoningGym(seed=1),
        ReasoningGym(options={"min_terms": 2}),
    ]  # fmt: skip
    assert len({json.dumps(source.fingerprint(), sort_keys=True) for source in sources}) == len(sources)
    assert sources[0].fingerprint() == {
        "source": "ReasoningGym", "task": "chain_sum", "size": 500, "seed": 0, "options": None,
        "package": version("reasoning-gym"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "chain_sums"}, "data.source.task=chain_sums: reasoning-gym has no such task. Did you mean chain_sum"),
        ({"task": "#"}, "reasoning-gym has no such task. It has ab, acre, advanced_geometry, "),
        ({"options": {"terms": 3}}, "data.source.options: chain_sum has no terms. It has allow_negation, "),
        ({"options": {"min_terms": 9}}, "data.source.options={min_terms: 9}: invalid for chain_sum: "),
        ({"task": "composite"}, "invalid for composite: Must specify at least one dataset"),
    ],
)
def test_unknown_task_or_option_is_an_error(settings, message, tmp_path):
    with pytest.raises(UserError) as error:
        read(ReasoningGym(**settings), tmp_path)
    assert message in str(error.value)


def test_options_cannot_hold_size_or_seed():
    with pytest.raises(UserError, match=r"options: cannot hold seed. Set data.source.seed"):
        ReasoningGym(options={"seed": 1})
    with pytest.raises(UserError, match=r"data.source.size=0: must be at least 1"):
        ReasoningGym(size=0)


def test_missing_package_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError) as error:
        read(ReasoningGym(), tmp_path)
    assert str(error.value) == "reasoning_gym needs an extra: pip install -e '.[verifiers]'"


def test_problem_is_written_and_read_back():
    """With tuples, sets, and numbers as keys. numpy scalars become Python scalars."""
    import numpy as np

    problem = {
        "task": "t", "options": None, "answer": np.str_("x"), "metadata": {1: (np.int64(2), [True, None]), "s": {0.5}},
    }  # fmt: skip
    found = read_problem(write_problem(problem))
    assert found == problem
    assert type(found["metadata"][1]) is tuple
    assert "np." not in write_problem(problem)
    with pytest.raises(ValueError, match="something other than numbers, text and containers"):
        write_problem({"task": object()})


@pytest.mark.parametrize("answer", ["42", "", "{'task': 'gcd'}", "__import__('os')", "(" * 500])
def test_answer_that_is_not_a_problem_is_an_error(answer):
    with pytest.raises(ValueError, match="is not a problem of reasoning-gym"):
        read_problem(answer)


def test_options_come_from_the_command_line():
    overrides = ["data=reasoning_gym", "data.source.task=gcd", "data.source.options={max_value: 30, min_numbers: 2}"]
    source = instantiate(composed(*overrides).data.source)
    assert source == ReasoningGym(task="gcd", options={"max_value": 30, "min_numbers": 2})
    json.dumps(source.fingerprint())
    listed = instantiate({"_target_": f"{ReasoningGym.__module__}.ReasoningGym", "options": {"x": [1, {"y": [2]}]}})
    assert ast.literal_eval(repr(listed.options)) == {"x": [1, {"y": [2]}]}
