"""A world of a few responses, drawn once."""

import pytest

from tests.helpers.testbed import random_world
from var.testbed.world import World


@pytest.fixture(scope="session")
def small() -> World:
    """4 prompts, 15 responses of up to 3 tokens."""
    return random_world(0)
