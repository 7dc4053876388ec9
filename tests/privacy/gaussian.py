"""Whether what a step released is N(0, std^2): a model with numbers enough to tell, and a test of them."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivateTraining, private_training

from ..models import drawn

COUNT = 20_000
NEVER = 1e-12  # a sample rate at which every batch is empty


class Wide(nn.Module):
    """One weight of COUNT numbers and one of half as many, all zero."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Linear(COUNT // 2, 2, bias=False, dtype=dtype)
        self.b = nn.Linear(COUNT // 2, 1, bias=False, dtype=dtype)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).sum(1) + self.b(x).sum(1)


def wide_scope(model: nn.Module, **kwargs: Any) -> PrivateTraining:
    """Return a scope over ten rows of zeros, in which a step moves the parameters by the noise on their sum."""
    data = TensorDataset(torch.zeros(10, COUNT // 2, dtype=next(model.parameters()).dtype))
    kwargs = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "noise_generator": drawn(),
        "loss_reduction": "sum",
        "accountant": "rdp",
        **kwargs,
    }
    params = [p for p in model.parameters() if p.requires_grad]
    return private_training(model, torch.optim.SGD(params, lr=1.0), DataLoader(data, batch_size=4), **kwargs)


def released(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    """What one step subtracts, by parameter name, with the model's own zero inputs as the batch."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step()
    return {name: before[name].double() - p.detach().double() for name, p in model.named_parameters()}


def noises_of(model: nn.Module, count: int = 1, **kwargs: Any) -> list[dict[str, Tensor]]:
    """The noise of the first steps, on empty batches."""
    with wide_scope(model, sample_rate=NEVER, **kwargs) as (opt, loader):
        return [released(model, opt) for _ in zip(range(count), loader, strict=False)]


def noise_of(model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:
    """The noise of one step on an empty batch."""
    return noises_of(model, **kwargs)[0]


def correlation(one: Tensor, other: Tensor) -> float:
    """The inner product of two pieces, as far as both reach, in standard deviations of what it is for independent numbers."""
    one, other = one.flatten().double(), other.flatten().double()
    size = min(len(one), len(other))
    one, other = one[:size], other[:size]
    return abs(float(one @ other)) / float(one.norm() * other.norm()) * math.sqrt(size)


def fits(numbers: Tensor, std: float) -> bool:
    """A chi-square test of N(0, std^2), and of its mean, at 4.5 standard deviations.

    Wrong with a chance of 1.4e-5 where the std is right. Of :data:`COUNT` numbers one that is 5 % off is ten deviations away.
    """
    numbers = numbers.flatten().double()
    n = numbers.numel()
    chi = (numbers.square().sum().item() / std**2 - n) / math.sqrt(2 * n)
    mean = numbers.sum().item() / (std * math.sqrt(n))
    return abs(chi) < 4.5 and abs(mean) < 4.5


def assert_fits_only(numbers: Tensor, std: float, *others: float) -> None:
    """Assert that many numbers are N(0, std^2), and neither of a std not far from it nor of one of the ``others``."""
    assert numbers.numel() >= COUNT
    assert fits(numbers, std)
    for wrong in (*others, *(factor * std for factor in (0.5, 0.9, 0.95, 1.05, 1.1, 2.0))):
        assert not fits(numbers, wrong)
