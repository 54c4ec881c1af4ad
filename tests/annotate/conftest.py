"""An annotator, and the model's own computation to compare with."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.annotators import make_annotator
from tests.helpers.models import pretrained
from var.annotate.annotator import Annotator


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., Annotator]:
    """Return a function that makes annotators of the tiny model, which share a cache."""
    return lambda reward=None, root=tmp_path, **options: make_annotator(tiny_folder, root, reward, **options)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the model's own forward on one sequence: log-probabilities, and a prompt's hidden states."""
    model = pretrained(tiny_folder, tmp_path_factory.mktemp("cache")).load()
    model.config._attn_implementation = "sdpa"

    @torch.inference_mode()
    def logps(prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]

    @torch.inference_mode()
    def states(prompt: list[int]) -> torch.Tensor:
        hidden: torch.Tensor = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
        return hidden

    return SimpleNamespace(logps=logps, states=states)
