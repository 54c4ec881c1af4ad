"""Arithmetic of our own making, embedded: prompts alone with their answers; nothing is read or fetched."""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, zip_longest
from typing import Any

from var.data.rows import Row, messages
from var.data.sources.local import settings
from var.utils.errors import UserError

# kind → (numbers, may both be the same, result, phrasings, how an id is written)
KINDS: dict[str, tuple[range, bool, Any, tuple[str, ...], str]] = {
    "product": (
        range(2, 10),
        True,
        lambda a, b: a * b,
        ("What is {a} times {b}? Answer with the number.", "Multiply {a} by {b}. Answer with the number only."),
        "product-{a}x{b}",
    ),
    "sum": (
        range(2, 21),
        True,
        lambda a, b: a + b,
        ("What is {a} plus {b}? Answer with the number.", "Add {a} and {b}. Answer with the number only."),
        "sum-{a}+{b}",
    ),
    "gcd": (
        range(2, 21),
        False,
        math.gcd,
        (
            "What is the greatest common divisor of {a} and {b}? Answer with the number.",
            "Find the greatest common divisor of {a} and {b}. Answer with the number only.",
        ),
        "gcd-{a},{b}",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Products of two digits, sums of two numbers up to 20, greatest common divisors up to 20.

    No problem comes twice, a × b and b × a being one. The kinds take turns until one has no more; the first n of a
    seed's problems are the same whatever `problems` is.
    """

    problems: int = 224
    seed: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"data.source.kinds are of {', '.join(KINDS)}, each once, got {list(self.kinds)}")
        room = sum(len(_operands(kind)) for kind in self.kinds)
        if not 1 <= self.problems <= room:
            raise UserError(
                f"data.source.problems={self.problems}: {', '.join(self.kinds)} have 1 to {room} distinct problems; "
                "ask for fewer, or for more kinds (sums have most)"
            )

    def records(self) -> Iterator[tuple[str, dict[str, str]]]:
        turns = zip_longest(*(self._shuffled(kind) for kind in self.kinds))
        problems = (problem for turn in turns for problem in turn if problem is not None)
        for number, problem in zip(range(1, self.problems + 1), problems, strict=False):
            yield f"arithmetic:{number}", problem

    def _shuffled(self, kind: str) -> Iterator[dict[str, str]]:
        *_, result, phrasings, name = KINDS[kind]
        draw = random.Random(f"{kind} {self.seed}")
        pairs = _operands(kind)
        draw.shuffle(pairs)
        for a, b in pairs:
            first, second = draw.sample((a, b), 2)
            prompt = draw.choice(phrasings).format(a=first, b=second)
            yield {"id": name.format(a=a, b=b), "prompt": prompt, "answer": str(result(a, b))}

    def row(self, where: str, record: Mapping[str, str]) -> Row:
        return Row(id=record["id"], prompt=messages(record["prompt"]), answer=record["answer"])

    def identity(self) -> Mapping[str, Any]:
        return settings(self)


def _operands(kind: str) -> list[tuple[int, int]]:
    """Every pair a ≤ b of the kind once."""
    numbers, same, *_ = KINDS[kind]
    return list((combinations_with_replacement if same else combinations)(numbers, 2))
