"""Worlds of a few responses, drawn once, and the curves of a short study."""

from typing import Any

import pytest

from experiments.tabular import stability
from experiments.tabular.worlds import draw_world
from var.testbed.world import World


@pytest.fixture(scope="session")
def small() -> World:
    """4 prompts, 15 responses of up to 3 tokens. Another prompt's response scores up to 2 lower."""
    return draw_world(3, prompts=4, letters=2, tokens=3, overlap=0.5, mismatch=2.0)


@pytest.fixture(scope="session")
def curves() -> list[dict[str, Any]]:
    """Losses of three methods along 120 steps."""
    world = draw_world(0, prompts=64, letters=2, tokens=3, overlap=0.3, offset=2.0, mismatch=4.0)
    chosen = [m for m in stability.STABLE if m.name in ("var_grouped", "alol_ref_free, A unclamped", "dpo")]
    return stability.make_table(world=world, methods=chosen, steps=120, rate=0.05, every=2)
