"""Arithmetic problems generated here, with answers and without responses. Nothing is downloaded; no license applies."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, islice, zip_longest
from typing import Any, NamedTuple

from var.data.messages import parse_prompt
from var.data.row import Row
from var.data.sources.local import describe_source
from var.utils.errors import UserError


class Kind(NamedTuple):
    """A kind of problems: a function of two numbers a and b."""

    pairs: list[tuple[int, int]]  # every pair a ≤ b once
    compute: Callable[[int, int], int]
    phrasings: tuple[str, ...]
    id: str


KINDS = {
    "product": Kind(
        list(combinations_with_replacement(range(2, 10), 2)),
        lambda a, b: a * b,
        ("What is {a} times {b}? Answer with the number.", "Multiply {a} by {b}. Answer with the number only."),
        "product-{a}x{b}",
    ),
    "sum": Kind(
        list(combinations_with_replacement(range(2, 21), 2)),
        lambda a, b: a + b,
        ("What is {a} plus {b}? Answer with the number.", "Add {a} and {b}. Answer with the number only."),
        "sum-{a}+{b}",
    ),
    "gcd": Kind(
        list(combinations(range(2, 21), 2)),
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
    """Generate distinct problems: products to 9 × 9, sums to 20 + 20, greatest common divisors of numbers to 20.

    The kinds alternate until one is exhausted. The first n problems of a seed do not depend on `problems`. Two sets of
    the same seed are disjoint if the second skips those of the first.
    """

    license = "none, since the problems are generated"

    problems: int = 224  # number of problems
    skip: int = 0  # problems that are left out before the first
    seed: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            got = ", ".join(map(str, self.kinds)) or "none"
            raise UserError(f"data.source.kinds: expected some of {', '.join(KINDS)}, each once, got {got}")
        available = sum(len(KINDS[kind].pairs) for kind in self.kinds)
        if self.problems < 1 or self.skip < 0 or self.skip + self.problems > available:
            skipped = f" after {self.skip} that are skipped" if self.skip else ""
            raise UserError(
                f"data.source.problems={self.problems}{skipped}: {', '.join(self.kinds)} have 1 to {available} "
                "distinct problems. Use fewer, or add kinds to data.source.kinds (sum has most)"
            )

    def records(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (where, problem)."""
        turns = zip_longest(*(self._generate(kind) for kind in self.kinds))
        problems = (problem for turn in turns for problem in turn if problem is not None)
        for number, problem in enumerate(islice(problems, self.skip, self.skip + self.problems), 1):
            yield f"arithmetic:{number}", problem

    def _generate(self, name: str) -> Iterator[dict[str, str]]:
        kind, rng = KINDS[name], random.Random(f"{name} {self.seed}")
        pairs = kind.pairs.copy()
        rng.shuffle(pairs)
        for a, b in pairs:
            first, second = rng.sample((a, b), 2)
            prompt = rng.choice(kind.phrasings).format(a=first, b=second)
            yield {"id": kind.id.format(a=a, b=b), "prompt": prompt, "answer": str(kind.compute(a, b))}

    def row(self, where: str, record: Mapping[str, str]) -> Row:
        """Return a row without responses."""
        return Row(id=record["id"], prompt=parse_prompt(record["prompt"]), answer=record["answer"])

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the settings."""
        return describe_source(self)
