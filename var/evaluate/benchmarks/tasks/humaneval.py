"""What lm-eval calls for the HumanEval tasks: the program of each response, and whether it passes its tests."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from var.evaluate.benchmarks import sandbox


def programs(responses: Iterable[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """The given code and the first response to it, continued."""
    return [document["prompt"] + several[0] for several, document in zip(responses, documents, strict=True)]


def pass_at_1(references: Sequence[str], predictions: Sequence[str], seconds: float, memory: int) -> float:
    """1 where the program reaches the end of its tests, else 0. seconds, memory (MiB): see sandbox.py."""
    return float(sandbox.run(f"{predictions[0]}\n{references[0]}", seconds, memory).passed)
