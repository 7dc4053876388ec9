"""Fixtures shared by all tests."""

import pytest
import torch

from . import models

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed also queues seeds for devices, and is slow


@pytest.fixture
def loader_of():
    """Return a function that makes a loader with all rows of some tensors in one batch, in order."""
    return models.loader_of
