"""Rewards of math-verify and reasoning-gym, with the packages themselves."""

import ast
import subprocess
import sys
import threading
from importlib.metadata import version

import pytest

from tests.helpers.runs import ROOT
from var.data.sources.reasoning_gym import ReasoningGym as Source
from var.data.sources.reasoning_gym import read_problem, write_problem
from var.rewards.numbers import READER_VERSION
from var.rewards.verifiers import EVALUATE, MathVerify, ReasoningGym
from var.utils.errors import UserError

PROMPT = ({"role": "user", "content": "?"},)


def verify(text: str, answer: str | None, **settings: int) -> float:
    pytest.importorskip("math_verify")
    (score,) = MathVerify(**settings)([PROMPT], [text], [answer])
    return score


RIGHT = [
    ("The answer is 42.", "42"), ("So it is $\\frac{1}{2}$.", "0.5"), ("0.5", "1/2"), ("\\boxed{\\frac12}", "\\frac12"),
    ("It is $1+x$", "x+1"), ("$(1,2)$", "(1,2)"), ("$2\\sqrt{3}$", "\\sqrt{12}"), ("72", "#### 72"), ("1234", "1,234"),
    ("it costs $12.00", "12"), ("$$x=3$$", "3"), ("$3$", "$3$"), ("\\boxed{4}, and not 3", "4"),
]  # fmt: skip
WRONG = [("4, not 3", "4"), ("43", "42"), ("-5", "5"), ("0.33", "1/3"), ("seven", "7"), ("", "7")]


def test_math_compares_final_answers():
    """The last boxed expression counts, else the last one."""
    pytest.importorskip("math_verify")
    texts, answers = zip(*RIGHT, *WRONG, strict=True)
    assert MathVerify()([PROMPT] * len(texts), texts, answers) == [1.0] * len(RIGHT) + [0.0] * len(WRONG)


def test_expression_that_takes_forever_times_out():
    assert verify("$9^{9^{9^9}}$", "5", timeout=1) == 0.0


def test_power_that_takes_forever_scores_low_at_once():
    """In another process: Python computes such a power in one call, which only a kill ends."""
    pytest.importorskip("reasoning_gym")
    texts = ["9**9**9**9", "9**(9**9)", "9**(99*99*99*99)", "((((9**99)**99)**99)**99)**99"]
    script = (
        "from tests.rewards.test_verifiers import PROMPT, ReasoningGym, Source\n"
        "source = Source(task='puzzle24', size=1)\n"
        "row = source.row(*next(source.records()))\n"
        f"texts = {texts}\n"
        "print(ReasoningGym(extract='none')([PROMPT] * len(texts), texts, [row.answer] * len(texts)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(score < 0.1 for score in ast.literal_eval(done.stdout))


def test_math_works_outside_the_main_thread():
    scores = []
    thread = threading.Thread(target=lambda: scores.extend([verify("$\\frac12$", "0.5"), verify("3", "0.5")]))
    thread.start()
    thread.join()
    assert scores == [1.0, 0.0]


def test_answer_that_is_not_mathematical_is_an_error():
    with pytest.raises(UserError) as error:
        verify("x", "")
    assert str(error.value) == "reward=math compares with a mathematical answer, but a row's `answer` is ''"
    with pytest.raises(UserError) as error:
        verify("1", None)
    assert str(error.value) == "this reward compares with a row's `answer`, but these rows have none"
    with pytest.raises(UserError, match=r"reward\.timeout=0: must be at least 1 second"):
        MathVerify(timeout=0)


def test_missing_packages_are_errors(monkeypatch):
    for package, reward, name in (
        ("math_verify", MathVerify(), "math"), ("reasoning_gym", ReasoningGym(), "reasoning_gym"),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError) as error:
            reward.fingerprint  # noqa: B018
        assert str(error.value) == f"reward={name} needs an extra: pip install -e '.[verifiers]'"


def test_identities_have_settings_and_package_versions():
    for name in ("math_verify", "reasoning_gym"):
        pytest.importorskip(name)
    assert MathVerify().fingerprint == {"program": "math_verify", "package": version("math-verify"), "timeout": 5}
    assert MathVerify(timeout=2).fingerprint != MathVerify().fingerprint
    assert ReasoningGym(extract="none").fingerprint == {
        "program": "reasoning_gym", "package": version("reasoning-gym"), "extract": "none",
    }  # fmt: skip
    assert ReasoningGym().fingerprint["reader"] == READER_VERSION


# --- reasoning-gym


def make_problem(task: str, **options: object) -> str:
    """Return the `answer` of a task's first row."""
    pytest.importorskip("reasoning_gym")
    source = Source(task=task, size=1, options=options or None)
    ((where, record),) = source.records()
    row = source.row(where, record)
    assert row is not None
    assert row.answer is not None
    return row.answer


def score(response: str, answer: str, extract: str = "none") -> float:
    (score,) = ReasoningGym(extract=extract)([PROMPT], [response], [answer])  # type: ignore[arg-type]
    return score


def test_own_answer_of_every_task_has_full_score():
    """Five tasks have no answer of their own: many answers are right, and the scorer needs only the problem."""
    from reasoning_gym.factory import DATASETS

    without = set()
    for task in sorted(set(DATASETS) - {"composite"}):
        answer = make_problem(task)
        own = read_problem(answer)["answer"]
        if own is None:
            without.add(task)
            assert 0 <= score("nothing like it", answer) <= 0.25  # propositional_logic gives 0.25
        else:
            assert score(own, answer) == 1.0, task
    assert without == {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.mark.parametrize(
    ("extract", "response", "expected"),
    [
        ("last_number", "First 3, so the sum is 1,012.", 1.0),
        ("last_number", "It is 1012, not 3", 0.0),
        ("last_number", "no number", 0.0),
        ("last_word", "The sum is **1012**.", 1.0),
        ("last_word", "1012 !", 1.0),
        ("last_word", "1012 it is", 0.0),
        ("last_word", " ... ", 0.0),
        ("last_word", "It is -1012.", 0.8),  # the sign is part of the word: 4 of its 5 characters are right
        ("none", " 1012\n", 1.0),
        ("none", "It is 1012", 0.4),  # 4 of 10 characters: the package's score of an answer in a sentence
        ("none", "", 0.0),
    ],
)
def test_extract_selects_the_answer(extract, response, expected):
    answer = read_problem(make_problem("gcd"))
    answer["answer"] = "1012"
    assert score(response, write_problem(answer), extract) == pytest.approx(expected)


def test_graded_scores_are_kept():
    """In knights_knaves, one right name of two scores 0.3 + 0.7/2."""
    answer = make_problem("knights_knaves")
    own = read_problem(answer)["answer"]
    names = read_problem(answer)["metadata"]["knight_knave_terms"]
    first, second = own.split(", and ")
    other = second.replace(names["knight"], "#").replace(names["knave"], names["knight"]).replace("#", names["knave"])
    assert score(f"{first}, and {other}", answer) == pytest.approx(0.65)


def test_options_reach_the_scorer():
    answer = read_problem(make_problem("gcd", max_value=30))
    answer["options"] = {"max_valeu": 30}
    with pytest.raises(UserError, match=r"gcd has no max_valeu\. It has max_numbers, max_value"):
        score("1", write_problem(answer))


def test_scorer_that_raises_scores_zero():
    """prime_factorization calls int() on every word."""
    answer = make_problem("prime_factorization")
    assert score("two times three", answer) == 0.0


@pytest.mark.parametrize("task", sorted(EVALUATE))
def test_text_of_a_model_is_never_run(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = make_problem(task)
    assert score("[__import__('pathlib').Path('made').touch()]", answer) < 0.1
    wrong = read_problem(answer)
    wrong["answer"] = "[__import__('pathlib').Path('made').touch()]"
    score("[1]", write_problem(wrong))
    assert not list(tmp_path.iterdir())


def test_rows_of_another_source_are_errors():
    pytest.importorskip("reasoning_gym")
    assert ReasoningGym().answer_fault("42") == "its answer '42' is not a problem of reasoning-gym"
    with pytest.raises(UserError) as error:
        score("1", "42")
    assert str(error.value) == (
        "reward=reasoning_gym scores rows of data=reasoning_gym, but a row's `answer` '42' is not a problem of "
        "reasoning-gym"
    )
    with pytest.raises(UserError, match="these rows have none"):
        ReasoningGym()([PROMPT], ["1"], [None])
    with pytest.raises(UserError, match=r"reward\.extract: expected last_number, last_word or none, got first"):
        ReasoningGym(extract="first")  # type: ignore[arg-type]
