"""Pairs for judges, and judges on a scripted server."""

from pathlib import Path
from typing import Any

from tests.helpers.servers import client, served
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


def play(judge: type, folder: Path, reply: Any, pairs: list[Pair], options: Any = None, **settings: Any) -> Any:
    """Judge the pairs on a scripted server; return the judgement and the bodies of all requests.

    options: of the client, whose replies are stored in `folder`. settings: of the judge.
    """
    with served(reply) as server:
        built = judge(client=client(server.base_url, folder, **(options or {})), **settings)
        built.check()
        return built(pairs, ignore), server.bodies
