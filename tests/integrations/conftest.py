"""Fixtures of the tests of trainers."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _accelerate_is_between_batches():
    """A training that is broken off may leave accelerate amid accumulated batches, for the rest of the process."""
    yield
    module = sys.modules.get("accelerate.state")
    shared = {} if module is None else module.GradientState._shared_state
    if shared:
        shared["sync_gradients"] = True
