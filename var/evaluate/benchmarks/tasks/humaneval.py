"""Functions that lm-eval calls for the HumanEval tasks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from var.evaluate.benchmarks import sandbox


def programs(responses: Iterable[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return each document's code, continued by the first response to it."""
    return [document["prompt"] + answers[0] for answers, document in zip(responses, documents, strict=True)]


def pass_at_1(references: Sequence[str], predictions: Sequence[str], seconds: float, memory: int) -> float:
    """Return 1 if the program reaches the end of its tests, else 0; seconds and memory (MiB) are the sandbox's."""
    return float(sandbox.run(f"{predictions[0]}\n{references[0]}", seconds, memory).passed)
