"""Rewards that verify a response with the packages math-verify and reasoning-gym (extra `verifiers`)."""

import ast
import operator
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal

from var.data.sources.reasoning_gym import make_dataset, read_problem
from var.rewards.base import Answers, Prompts
from var.rewards.numbers import READER_VERSION, find_last_number
from var.rewards.programmatic import require_answers
from var.utils.errors import UserError
from var.utils.extras import import_extra

EDGES = ".,;:!?…\"'`*_()[]{}<>"  # characters around a last word that are not part of it
# The functions that sympy's parse_expr, which calls eval, may call in a text.
FUNCTIONS = {
    "Abs", "Integer", "Rational", "acos", "asin", "atan", "cos", "cosh", "cot", "exp", "ln", "log", "sin", "sinh",
    "sqrt", "tan", "tanh",
}  # fmt: skip
INTEGER_BITS = 100_000  # of a result; the package's longest problem has about 20,000
OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MathVerify:
    r"""Score a response with 1 if its final answer equals the row's `answer` mathematically, else with 0 (math-verify).

    The answer is plain text or LaTeX: 1/2, \frac12, \boxed{x+1}. In a response the last boxed expression counts, else
    the last expression or number.
    """

    # Seconds for one parsing or comparison; an answer that takes longer scores 0. The package uses a signal, which
    # works only in the main thread: in other threads there is no limit.
    timeout: int = 5
    key: str = field(default="reward", compare=False)  # where these settings are, for messages

    scores_text = True
    reads_answers = True
    counts = "right answers"

    def __post_init__(self) -> None:
        if self.timeout < 1:
            raise UserError(f"{self.key}.timeout={self.timeout}: must be at least 1 second")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The version of the package and the timeout. Raise a `UserError` if the package is missing."""
        import_extra("math_verify", "verifiers", f"{self.key}=math")
        return {"program": "math_verify", "package": version("math-verify"), "timeout": self.timeout}

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return 1 or 0 per response."""
        package = import_extra("math_verify", "verifiers", f"{self.key}=math")
        seconds = self.timeout if threading.current_thread() is threading.main_thread() else None
        required = require_answers(answers)
        parsed = {answer: self._parse_answer(package.parse, answer, seconds) for answer in set(required)}
        return [
            float(package.verify(parsed[answer], package.parse(text, parsing_timeout=seconds), timeout_seconds=seconds))
            for text, answer in zip(responses, required, strict=True)
        ]

    def _parse_answer(self, parse: Callable[..., list[Any]], answer: str, seconds: int | None) -> list[Any]:
        """Return the expressions of a row's answer. LaTeX is recognized without its $ signs too."""
        latex = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        if not (found := parse(latex, parsing_timeout=seconds)):
            raise UserError(
                f"{self.key}=math compares with a mathematical answer, but a row's `answer` is {answer[:60]!r}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """Score a response to a problem of data=reasoning_gym with reasoning-gym's own score in [0, 1].

    Many tasks are graded, and most give almost nothing for an answer inside a sentence. Hence `extract` says which part
    of the response is its answer. A response without a number or a word scores 0.
    """

    # last_number, last_word, or none: the complete response, as a grid of several lines needs.
    extract: Literal["last_number", "last_word", "none"] = "last_number"
    key: str = field(default="reward", compare=False)  # where these settings are, for messages

    scores_text = True
    reads_answers = True

    def __post_init__(self) -> None:
        if self.extract not in ("last_number", "last_word", "none"):
            raise UserError(f"{self.key}.extract: expected last_number, last_word or none, got {self.extract}")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The version of the package, `extract` and its version. Raise a `UserError` if the package is missing."""
        import_extra("reasoning_gym", "verifiers", f"{self.key}=reasoning_gym")
        reader = {"reader": READER_VERSION} if self.extract == "last_number" else {}
        return {"program": "reasoning_gym", "package": version("reasoning-gym"), "extract": self.extract, **reader}

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one score per response."""
        return [self._score(text, answer) for text, answer in zip(responses, require_answers(answers), strict=True)]

    def answer_fault(self, answer: str) -> str | None:
        """Return a reason if the answer is from another data set, else None."""
        try:
            read_problem(answer)
        except ValueError as error:
            return f"its answer {error}"
        return None

    def _score(self, response: str, answer: str) -> float:
        try:
            problem = read_problem(answer)
        except ValueError as error:
            raise UserError(
                f"{self.key}=reasoning_gym scores rows of data=reasoning_gym, but a row's `answer` {error}"
            ) from None
        scorer = _make_scorer(problem["task"], repr(problem["options"]))
        _shadow_eval()  # a task imports some modules when it is first used
        if (found := self._extract(response)) is None:
            return 0.0
        try:
            return float(scorer(found, problem))
        except Exception:  # scorers of some tasks raise for a response of another form
            return 0.0

    def _extract(self, response: str) -> str | None:
        """Return the answer in a response, or None."""
        if self.extract == "none":
            return response.strip() or None
        if self.extract == "last_number":
            return None if (number := find_last_number(response)) is None else number.text
        return next((word for word in (word.strip(EDGES) for word in reversed(response.split())) if word), None)


@lru_cache(maxsize=256)
def _make_scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    """Return the scorer of a task. Before it runs, `_shadow_eval` has to."""
    return make_dataset(task, 1, 0, ast.literal_eval(options)).score_answer


def _shadow_eval() -> None:
    """Shadow the builtin eval and sympy's parse_expr by global names in all modules of reasoning-gym that are loaded.

    So the text of a model or a row is never run.

    Also where the package does not call them today: a later version may, or one task may use the scorer of another.
    """
    import sympy  # the package has imported it

    modules = {name: module for name, module in sys.modules.items() if name.startswith("reasoning_gym.")}
    if not (new := modules.keys() - _shadowed):
        return
    _shadowed.update(new)
    safe_sympy = SimpleNamespace(**{**vars(sympy), "parse_expr": _parse_expression})
    for module in (modules[name] for name in new):
        names, last = vars(module), module.__name__.rpartition(".")[2]
        if last not in GENERATORS:
            names["eval"] = EVALUATE.get(last, _reject_eval)
        for name, value in list(names.items()):  # the function or the package, under any name
            if value is sympy.parse_expr:
                names[name] = _parse_expression
            elif value is sympy:
                names[name] = safe_sympy


_shadowed: set[str] = set()
"""The modules in which they are shadowed."""


def _reject_eval(text: str) -> Any:
    raise ValueError(f"this scorer would run the text {text[:60]!r}")


def _compute_integer(text: str) -> int:
    """Return the value of an expression of integers and OPERATIONS, of at most INTEGER_BITS. Else raise ValueError."""

    def compute(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -compute(node.operand)
        if isinstance(node, ast.BinOp) and (operate := OPERATIONS.get(type(node.op))):
            left, right = compute(node.left), compute(node.right)
            if not isinstance(node.op, ast.LShift) or right <= INTEGER_BITS:
                value = operate(left, right)
                if value.bit_length() <= INTEGER_BITS:
                    return value
        raise ValueError(f"{text[:60]!r} has more than integers of {INTEGER_BITS} bits and their operators")

    return compute(ast.parse(text.strip(), mode="eval").body)


# What runs in place of Python's eval in each module that calls it (reasoning-gym 0.1.25). Others have _reject_eval.
EVALUATE: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(
        ("binary_matrix", "n_queens", "number_sorting", "spiral_matrix", "string_insertion"), ast.literal_eval
    ),
    **dict.fromkeys(("basic_arithmetic", "bitwise_arithmetic"), _compute_integer),
}
GENERATORS = {"generators_00_49", "generators_50_99"}  # of gsm_symbolic: they evaluate only their own text


def _parse_expression(text: str, local_dict: dict[str, Any] | None = None) -> Any:
    """Parse an expression of numbers, names, operators and FUNCTIONS with sympy's parse_expr.

    Raise a ValueError for anything else, and for a power that could take forever: Python computes 9**9**9 in one call,
    which no time limit can interrupt.
    """
    import sympy

    plain = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Name, ast.Load)
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        if not (call or number or isinstance(node, plain)):
            raise ValueError(f"{text[:60]!r} has more than numbers, names, operators and known functions")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _is_fast_power(node):
            raise ValueError(f"{text[:60]!r} has a power that may take forever")
    return sympy.parse_expr(text, local_dict=local_dict)


def _is_fast_power(power: ast.BinOp) -> bool:
    """Return whether the exponent has numbers to 100 and one operation, and the base at most two powers.

    The largest number is then about 9**1000000.
    """
    exponent, base = list(ast.walk(power.right)), list(ast.walk(power.left))
    numbers = [part.value for part in exponent if isinstance(part, ast.Constant)]
    small = all(isinstance(number, int | float) and abs(number) <= 100 for number in numbers)
    operations = [part.op for part in exponent if isinstance(part, ast.BinOp)]
    powers = sum(isinstance(part, ast.Pow) for part in base)
    return small and len(operations) <= 1 and ast.Pow not in map(type, operations) and powers <= 2
