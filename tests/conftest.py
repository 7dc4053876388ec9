"""Fixtures shared by all tests."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def loader_of():
    """Return a function that makes a loader with all rows of ``tensors`` in one batch, in order."""

    def make(tensors, batch_size=None):
        dataset = torch.utils.data.TensorDataset(*tensors)
        return torch.utils.data.DataLoader(dataset, batch_size=batch_size or len(dataset))

    return make
