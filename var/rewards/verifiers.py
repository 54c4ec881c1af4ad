"""Rewards that check a response by a package: math-verify and reasoning-gym (extra `verifiers`)."""

import ast
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal

from var.data.rows import Message
from var.data.sources.reasoning_gym import dataset, read_problem
from var.rewards.programmatic import given, last_number
from var.utils.errors import UserError

EXTRA = "reward={} needs an extra: pip install -e '.[verifiers]'"
EDGES = ".,;:!?…\"'`*_()[]{}<>"  # what stands around a last word and is not of it
# Tasks whose scorer hands the response, or the problem's answer, to Python's eval (0.1.25).
EVALUATE = {"binary_matrix", "n_queens", "number_sorting", "spiral_matrix", "string_insertion"}
# Tasks whose scorer hands it to sympy's parse_expr, which is eval too; it may call these.
PARSE = {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
FUNCTIONS = {
    "Abs", "Integer", "Rational", "acos", "asin", "atan", "cos", "cosh", "cot", "exp", "ln", "log", "sin", "sinh",
    "sqrt", "tan", "tanh",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MathVerify:
    """1 where the final answer of the response equals the row's `answer` mathematically, else 0 (package math-verify).

    The answer is plain or LaTeX: 1/2, \\frac12, \\boxed{x+1}; of the response the last boxed one counts, else the last
    expression or number. timeout: seconds, at least 1, for one parsing or comparison; one that takes longer is 0. The
    package counts them by a signal, which only the main thread can have: elsewhere there is no limit.
    """

    timeout: int = 5

    scores_text = True
    reads_answers = True

    def __post_init__(self) -> None:
        if self.timeout < 1:
            raise UserError(f"reward.timeout={self.timeout}: whole seconds, at least 1")

    @property
    def identity(self) -> dict[str, Any]:
        _math_verify()  # a missing package is told before anything is sampled
        return {"program": "math_verify", "package": version("math-verify"), "timeout": self.timeout}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        parse, verify = _math_verify()
        seconds = self.timeout if threading.current_thread() is threading.main_thread() else None
        wished = given(answers)
        wanted = {answer: self._wanted(parse, answer, seconds) for answer in set(wished)}
        return [
            float(verify(wanted[answer], parse(text, parsing_timeout=seconds), timeout_seconds=seconds))
            for text, answer in zip(responses, wished, strict=True)
        ]

    def _wanted(self, parse: Callable[..., list[Any]], answer: str, seconds: int | None) -> list[Any]:
        """LaTeX without its signs is taken as LaTeX too."""
        signed = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        if not (found := parse(signed, parsing_timeout=seconds)):
            raise UserError(f"reward=math compares with mathematics, and a row's `answer` is {answer[:60]!r}")
        return found


def _math_verify() -> tuple[Callable[..., list[Any]], Callable[..., bool]]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError(EXTRA.format("math")) from error
    return parse, verify


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """The score in [0, 1] that reasoning-gym gives a response to a problem of data=reasoning_gym; many are graded.

    extract: last_number or last_word: what of the response is its answer, since most tasks give next to nothing for
    an answer inside a sentence; none: all of it, as a grid of several lines needs. Without a number or a word it is 0.
    """

    extract: Literal["last_number", "last_word", "none"] = "last_number"

    scores_text = True
    reads_answers = True

    def __post_init__(self) -> None:
        if self.extract not in ("last_number", "last_word", "none"):
            raise UserError(f"reward.extract is last_number, last_word or none, got {self.extract}")

    @property
    def identity(self) -> dict[str, Any]:
        try:
            import reasoning_gym  # noqa: F401  a missing package is told before anything is sampled
        except ImportError as error:
            raise UserError(EXTRA.format("reasoning_gym")) from error
        return {"program": "reasoning_gym", "package": version("reasoning-gym"), "extract": self.extract}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        return [self._score(text, answer) for text, answer in zip(responses, given(answers), strict=True)]

    def answer_fault(self, answer: str) -> str | None:
        """Of a row of another data set."""
        try:
            read_problem(answer)
        except ValueError as error:
            return f"its answer is {error}"
        return None

    def _score(self, response: str, answer: str) -> float:
        try:
            problem = read_problem(answer)
        except ValueError as error:
            raise UserError(
                f"reward=reasoning_gym scores rows of data=reasoning_gym; a row's `answer` is {error}"
            ) from None
        scorer = _scorer(problem["task"], repr(problem["options"]))
        if (found := self._extracted(response)) is None:
            return 0.0
        try:
            return float(scorer(found, problem))
        except Exception:  # some tasks' own scorers raise on a response that is not of their form
            return 0.0

    def _extracted(self, response: str) -> str | None:
        if self.extract == "none":
            return response.strip() or None
        if self.extract == "last_number":
            return last_number(response)
        return next((word for word in map(_stripped, reversed(response.split())) if word), None)


@lru_cache(maxsize=256)
def _scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    problems = dataset(task, 1, 0, ast.literal_eval(options))
    names = vars(sys.modules[type(problems).__module__])
    if task in EVALUATE:  # a module's own name comes before Python's: what a model wrote is read, never run
        names["eval"] = ast.literal_eval
    if task in PARSE:
        import sympy

        for name, held in list(names.items()):  # the function itself, or the package, under whatever name
            if held is sympy.parse_expr:
                names[name] = _parsed
            elif held is sympy:
                names[name] = SimpleNamespace(**{**vars(sympy), "parse_expr": _parsed})
    return problems.score_answer


def _parsed(text: str, local_dict: dict[str, Any] | None = None) -> Any:
    """sympy's parse_expr of numbers, names, operators and FUNCTIONS alone; a ValueError at anything else, and at a
    power that could take forever: 9**9**9 is computed in one call, which no time limit ends."""
    import sympy

    plain = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Name, ast.Load)
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        if not (call or number or isinstance(node, plain)):
            raise ValueError(f"{text[:60]!r} is no expression of numbers, names, operators and known functions")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _quick(node):
            raise ValueError(f"{text[:60]!r} has a power whose exponent is neither small nor simple")
    return sympy.parse_expr(text, local_dict=local_dict)


def _quick(power: ast.BinOp) -> bool:
    """An exponent of numbers to 100 and one operation, and at most three powers of one another: 9**1000000 at most."""
    exponent, base = list(ast.walk(power.right)), list(ast.walk(power.left))
    numbers = [part.value for part in exponent if isinstance(part, ast.Constant)]
    small = all(isinstance(number, int | float) and abs(number) <= 100 for number in numbers)
    operations = [part.op for part in exponent if isinstance(part, ast.BinOp)]
    powers = sum(isinstance(part, ast.Pow) for part in base)
    return small and len(operations) <= 1 and ast.Pow not in map(type, operations) and powers <= 2


def _stripped(word: str) -> str:
    return word.strip(EDGES)
