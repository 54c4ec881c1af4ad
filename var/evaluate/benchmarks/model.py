"""A loaded model as lm-eval uses it, on several ranks: the first one runs the tasks, all answer its requests.

So the prompts, the shots that a task draws, and the execution of generated programs are those of a single process.
lm-eval's own data parallelism deals documents to processes, each of which draws its own shots.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from var.models.attention import use_attention
from var.utils.distributed import Ranks


class SharedLM(HFLM):
    """A loaded transformers model that answers its part of the requests of the first rank."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ranks = ranks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """Return the log-probability of each continuation, and whether it is the most likely one."""
        return self._share("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """Return the log-probability of each text."""
        return self._share("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """Return a response to each prompt."""
        return self._share("generate_until", requests)

    def serve(self) -> None:
        """Answer the first rank's requests until it calls `stop`."""
        while (message := _broadcast(None)) is not None:
            self._answer(*message)

    def stop(self) -> None:
        """End `serve` on the other ranks."""
        if self.ranks.world > 1:
            _broadcast(None)

    def _share(self, method: str, requests: list[Instance]) -> list[Any]:
        if self.ranks.world > 1:
            _broadcast((method, requests))
        return self._answer(method, requests)

    def _answer(self, method: str, requests: list[Instance]) -> list[Any]:
        """Answer this rank's part of the requests; return all answers, in order, on the first rank."""
        contexts: dict[Any, int] = {}  # requests with the same context share its forward pass: deal contexts
        owners = [contexts.setdefault(request.args[0], len(contexts)) % self.ranks.world for request in requests]
        own = [request for request, owner in zip(requests, owners, strict=True) if owner == self.ranks.rank]
        answers = getattr(super(), method)(own, disable_tqdm=self.ranks.rank > 0) if own else []
        if self.ranks.world == 1:
            return answers
        parts: list[Any] = [None] * self.ranks.world
        torch.distributed.gather_object(answers, parts if self.ranks.rank == 0 else None)
        if self.ranks.rank > 0:
            return []
        remaining = list(map(iter, parts))
        return [next(remaining[owner]) for owner in owners]


def _broadcast(message: Any) -> Any:
    """Return the first rank's message."""
    box = [message]
    torch.distributed.broadcast_object_list(box)
    return box[0]


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """Switch to plain attention and few log lines; then restore them, the model's modes and the random state."""
    from lightning.pytorch.utilities.seed import isolate_rng

    modes = {module: module.training for module in model.modules()}
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with use_attention(model, "sdpa"), isolate_rng():
            yield
    finally:
        logger.setLevel(level)
        for module, mode in modes.items():
            module.training = mode
