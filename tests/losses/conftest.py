"""Fixtures for the tests of losses."""

import pytest

from tests.helpers.losses import LENGTHS, REFERENCE, make_batch
from var.models.packing import Packed


@pytest.fixture
def pairs() -> Packed:
    """Two pairs with the reference's log-probabilities."""
    return make_batch(LENGTHS, reference_logps=REFERENCE)
