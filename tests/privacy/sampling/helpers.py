"""A dataset whose values tell their index, and scopes over loaders of it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dp_hooks import PrivateTraining, private_training

from ...training.helpers import sgd


class Rows(Dataset):
    """Example ``i`` is ``(vector of ones times i + 1, label i + 1)``: every value tells its index, and none is zero."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return torch.full((3,), float(i + 1)), i + 1


def stack(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in examples]), torch.tensor([y for _, y in examples])


def as_tensor(examples: Any) -> Tensor:
    return stack(examples)[0]


def as_dict(examples: Any) -> dict[str, Any]:
    x, y = stack(examples)
    return {"x": x, "extra": {"y": y, "mask": x > 0}}


def loader_over(n: int, batch_size: int, **options: Any) -> DataLoader:
    """Return a loader over ``n`` rows whose batches are one tensor."""
    return DataLoader(Rows(n), batch_size=batch_size, **{"collate_fn": as_tensor, **options})


def private(loader: Any, model: nn.Module | None = None, **kwargs: Any) -> PrivateTraining:
    """Return a scope over ``loader``."""
    model = nn.Linear(3, 1) if model is None else model
    return private_training(model, sgd(model), loader, **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, **kwargs})


def batches_of(loader: Any, passes: int = 1, **kwargs: Any) -> list[Any]:
    """Return the batches of the private loader."""
    with private(loader, **kwargs) as (_, own):
        return [batch for _ in range(passes) for batch in own]


def indices(batches: list[Tensor]) -> list[list[float]]:
    """Return the first column of batches that are one tensor each."""
    return [batch[:, 0].tolist() for batch in batches]
