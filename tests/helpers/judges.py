"""Pairs for judges."""

from typing import Any

from var.evaluate.judges.base import Pair


def pair(id: str, subset: str | None = None, seed: int = 0, question: str | None = None, **fields: Any) -> Pair:
    """Return a pair; the answers are marked so that a scripted server can tell them apart."""
    prompt = ({"role": "user", "content": question or f"question {id}."},)
    return Pair(
        **{"id": id, "subset": subset, "seed": seed, "prompt": prompt, "answer": "<answer ours>",
           "opponent": "<answer theirs>", **fields}
    )  # fmt: skip


def ignore(done: int) -> None:
    """Ignore progress."""
