"""Rewards of packages, on the packages themselves."""

import ast
import subprocess
import sys
import threading
from importlib.metadata import version

import pytest

from tests.helpers.runs import ROOT
from var.data.sources.reasoning_gym import ReasoningGym as Source
from var.data.sources.reasoning_gym import read_problem, written
from var.rewards.verifiers import EVALUATE, MathVerify, ReasoningGym
from var.utils.errors import UserError

PROMPT = ({"role": "user", "content": "?"},)


def math(text: str, answer: str | None, **settings: int) -> float:
    pytest.importorskip("math_verify")
    (score,) = MathVerify(**settings)([PROMPT], [text], [answer])
    return score


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is 42.", "42", 1.0),
        ("So it is $\\frac{1}{2}$.", "0.5", 1.0),
        ("0.5", "1/2", 1.0),
        ("\\boxed{\\frac12}", "\\frac12", 1.0),
        ("It is $1+x$", "x+1", 1.0),
        ("$(1,2)$", "(1,2)", 1.0),
        ("$2\\sqrt{3}$", "\\sqrt{12}", 1.0),
        ("72", "#### 72", 1.0),
        ("1234", "1,234", 1.0),
        ("it costs $12.00", "12", 1.0),
        ("$$x=3$$", "3", 1.0),
        ("$3$", "$3$", 1.0),
        ("4, not 3", "4", 0.0),  # the last one counts
        ("\\boxed{4}, and not 3", "4", 1.0),  # unless one is boxed
        ("43", "42", 0.0),
        ("-5", "5", 0.0),
        ("0.33", "1/3", 0.0),
        ("seven", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_math_is_equal_where_the_final_answers_are(text, answer, expected):
    assert math(text, answer) == expected


def test_math_of_many_keeps_the_order():
    pytest.importorskip("math_verify")
    assert MathVerify()([PROMPT] * 4, ["1", "2", "3", "4"], ["1", "1", "3", "1"]) == [1.0, 0.0, 1.0, 0.0]


def test_an_expression_that_would_take_forever_is_wrong_in_time():
    assert math("$9^{9^{9^9}}$", "5", timeout=1) == 0.0


def test_a_power_that_would_take_forever_is_wrong_at_once():
    """In a process of its own: Python computes it in one call, which nothing but a kill ends."""
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


def test_math_runs_outside_the_main_thread_where_signals_do_not():
    scores = []
    thread = threading.Thread(target=lambda: scores.extend([math("$\\frac12$", "0.5"), math("3", "0.5")]))
    thread.start()
    thread.join()
    assert scores == [1.0, 0.0]


def test_an_answer_that_is_no_mathematics_is_told():
    with pytest.raises(UserError) as error:
        math("x", "")
    assert str(error.value) == "reward=math compares with mathematics, and a row's `answer` is ''"
    with pytest.raises(UserError) as error:
        math("1", None)
    assert str(error.value) == "this reward compares with a row's `answer`; these rows have none"
    with pytest.raises(UserError, match=r"reward\.timeout=0: whole seconds, at least 1"):
        MathVerify(timeout=0)


def test_without_their_packages_they_say_how_to_get_them(monkeypatch):
    for package, reward, name in (
        ("math_verify", MathVerify(), "math"), ("reasoning_gym", ReasoningGym(), "reasoning_gym"),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError) as error:
            reward.identity  # noqa: B018
        assert str(error.value) == f"reward={name} needs an extra: pip install -e '.[verifiers]'"


def test_identities_hold_settings_and_the_packages_versions():
    for name in ("math_verify", "reasoning_gym"):
        pytest.importorskip(name)
    assert MathVerify().identity == {"program": "math_verify", "package": version("math-verify"), "timeout": 5}
    assert MathVerify(timeout=2).identity != MathVerify().identity
    assert ReasoningGym(extract="none").identity == {
        "program": "reasoning_gym", "package": version("reasoning-gym"), "extract": "none",
    }  # fmt: skip


# --- reasoning-gym


def problem(task: str, **options: object) -> str:
    """The `answer` of a task's first row."""
    pytest.importorskip("reasoning_gym")
    source = Source(task=task, size=1, options=options or None)
    ((where, record),) = source.records()
    row = source.row(where, record)
    assert row is not None
    assert row.answer is not None
    return row.answer


def scored(response: str, answer: str, extract: str = "none") -> float:
    (score,) = ReasoningGym(extract=extract)([PROMPT], [response], [answer])  # type: ignore[arg-type]
    return score


def test_every_tasks_own_answer_has_full_score_after_it_was_written_down():
    """Five tasks have no own answer: many are right there, and the package's verifier needs the problem alone."""
    from reasoning_gym.factory import DATASETS

    without = set()
    for task in sorted(set(DATASETS) - {"composite"}):
        answer = problem(task)
        own = read_problem(answer)["answer"]
        if own is None:
            without.add(task)
            assert 0 <= scored("nothing like it", answer) <= 0.25  # propositional_logic gives it that much
        else:
            assert scored(own, answer) == 1.0, task
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
        ("last_word", "It is -1012.", 0.8),  # a sign is of the word: 4 of its 5 characters
        ("none", " 1012\n", 1.0),
        ("none", "It is 1012", 0.4),  # 4 of 10 characters: the package's own score inside a sentence
        ("none", "", 0.0),
    ],
)
def test_what_of_a_response_is_its_answer(extract, response, expected):
    answer = read_problem(problem("gcd"))
    answer["answer"] = "1012"
    assert scored(response, written(answer), extract) == pytest.approx(expected)


def test_a_graded_score_stays_graded():
    """knights_knaves: one of two names right is 0.3 + 0.7/2."""
    answer = problem("knights_knaves")
    own = read_problem(answer)["answer"]
    names = read_problem(answer)["metadata"]["knight_knave_terms"]
    first, second = own.split(", and ")
    other = second.replace(names["knight"], "#").replace(names["knave"], names["knight"]).replace("#", names["knave"])
    assert scored(f"{first}, and {other}", answer) == pytest.approx(0.65)


def test_options_reach_the_scorer():
    answer = read_problem(problem("gcd", max_value=30))
    answer["options"] = {"max_valeu": 30}
    with pytest.raises(UserError, match="gcd has no max_valeu; it has max_numbers, max_value"):
        scored("1", written(answer))


def test_a_scorer_that_raises_on_a_response_gives_nothing():
    """prime_factorization of the pinned package takes int() of every word."""
    answer = problem("prime_factorization")
    assert scored("two times three", answer) == 0.0


@pytest.mark.parametrize("task", sorted(EVALUATE))
def test_what_a_model_wrote_is_never_run(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = problem(task)
    assert scored("[__import__('pathlib').Path('made').touch()]", answer) < 0.1
    wrong = read_problem(answer)
    wrong["answer"] = "[__import__('pathlib').Path('made').touch()]"
    scored("[1]", written(wrong))
    assert not list(tmp_path.iterdir())


def test_rows_of_another_source_are_told():
    pytest.importorskip("reasoning_gym")
    assert ReasoningGym().answer_fault("42") == "its answer is no problem of reasoning-gym's but '42'"
    with pytest.raises(UserError) as error:
        scored("1", "42")
    assert str(error.value) == (
        "reward=reasoning_gym scores rows of data=reasoning_gym; a row's `answer` is no problem of reasoning-gym's "
        "but '42'"
    )
    with pytest.raises(UserError, match="these rows have none"):
        ReasoningGym()([PROMPT], ["1"], [None])
    with pytest.raises(UserError, match=r"reward\.extract is last_number, last_word or none, got first"):
        ReasoningGym(extract="first")  # type: ignore[arg-type]
