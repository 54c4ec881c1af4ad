"""A batch by hand: only lengths matter to a loss, tokens do not."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from var.packing import Packed, pack


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Packed]:
    def build(lengths: Sequence[int], **extra: Any) -> Packed:
        """Sequences of one prompt token and so many response tokens. Divisors: of this batch, unless given."""
        divisors = {"global_tokens": float(sum(lengths)), "global_sequences": float(len(lengths))}
        return pack([[0, *range(1, n + 1)] for n in lengths], [1] * len(lengths), **{**divisors, **extra})

    return build
