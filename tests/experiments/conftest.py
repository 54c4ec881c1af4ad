"""Worlds of a few answers, drawn once."""

import pytest

from var.testbed.world import World, draw


@pytest.fixture(scope="session")
def small() -> World:
    """4 prompts, 15 answers of up to 3 tokens; another prompt's answer scores up to 2 lower."""
    return draw(3, prompts=4, letters=2, tokens=3, overlap=0.5, mismatch=2.0)
