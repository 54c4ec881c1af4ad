"""Sample on the pretend device."""

from types import SimpleNamespace
from typing import Any

from tests.helpers.models import tiny_model
from tests.helpers.pretend import DEVICE, Pretend, syncs
from var.sampling.base import Sampling
from var.sampling.local import sample_tokens

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]


CHAT: Any = SimpleNamespace(end_tokens={257})


def make_sampling(tokens: int) -> Sampling:
    """Return the settings of four responses of up to so many tokens per prompt."""
    return Sampling(responses=4, temperature=1.0, top_p=0.9, max_new_tokens=tokens, batch=12, batch_tokens=4096, seed=0)


def count_waits(tokens: int) -> int:
    """Return how often the host waits for the device while responses of up to so many tokens are sampled."""
    with Pretend():
        model = tiny_model().to(DEVICE)
        syncs.clear()
        responses = sample_tokens(model, CHAT, PROMPTS, make_sampling(tokens))
        assert max(len(ids) for several in responses for ids in several) == tokens
        return len(syncs)


def test_sampled_tokens_equal_those_of_the_cpu():
    expected = sample_tokens(tiny_model(), CHAT, PROMPTS, make_sampling(8))
    with Pretend():
        assert sample_tokens(tiny_model().to(DEVICE), CHAT, PROMPTS, make_sampling(8)) == expected


def test_sampling_waits_once_per_16_tokens():
    """What it waits for before the first token does not count."""
    assert count_waits(64) - count_waits(16) <= (64 - 16) / 16
