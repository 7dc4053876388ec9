"""Fixtures shared by all tests."""

import gc
import random

import pytest
import torch

from dp_hooks.checks import spot_check

from . import models

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave modules and collected tests out of garbage collection: many tests collect, each would go through all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state."""
    spot_check._ENTROPY = random.Random(0)  # no later batch is looked at anew unless a test wants it
    torch.default_generator.manual_seed(0)  # torch.manual_seed also queues seeds for devices, and is slow


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat small parameters as large ones are treated: none is written out only since that takes fewer operations."""
    monkeypatch.setattr("dp_hooks.gradients.joined._SMALL", {"cpu": -1})


@pytest.fixture
def loader_of():
    """Return a function that makes a loader with all rows of some tensors in one batch, in order."""
    return models.loader_of
