"""The function that lm-eval calls for GSM8K."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from var.rewards.numbers import find_last_number, read_number


def last_numbers(responses: Iterable[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the number of each first response: the document's answer as it is written if both are equal."""
    numbers = []
    for answers, document in zip(responses, documents, strict=True):
        found, right = find_last_number(answers[0]), read_number(document["answer"])
        if found is not None and right is not None and found.value == right.value:
            numbers.append(document["answer"].rpartition("#### ")[2].strip())
        else:
            numbers.append("[none]" if found is None else found.text)
    return numbers
