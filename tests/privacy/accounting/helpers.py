"""Runs whose charges are looked at, and accountants to compare them with."""

import copy
from typing import Any

import torch
from opacus.accountants import IAccountant, create_accountant
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ...models import drawn, examples
from ...training.helpers import Run, train

DELTA = 1e-5
ACCOUNTANTS = ["pld", "prv", "rdp", "gdp"]
ELSEWHERE: tuple[Tensor, Tensor] = examples(4)  # a batch that no private loader handed out


def with_momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def accountant_with(history: list[tuple[float, float, int]], mechanism: str = "prv") -> IAccountant:
    """An Opacus accountant with ``history`` written by hand."""
    accountant = create_accountant(mechanism=mechanism)
    accountant.history = history
    return accountant


class Charged(Run):
    """A run with Poisson sampling, sigma 1 or a budget, over 12 examples in batches of 4."""

    def __init__(self, n: int = 12, batch: int = 4, *, optimizer: Any = with_momentum, **options: Any) -> None:
        defaults = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": True}
        if "target_epsilon" in options:
            defaults |= {"noise_multiplier": None, "target_delta": DELTA, "accountant": "rdp"}
        loader = DataLoader(TensorDataset(*examples(n)), batch_size=batch, generator=drawn())
        super().__init__(optimizer=optimizer, loader=loader, **{**defaults, **options})

    @property
    def history(self) -> list[tuple[float, float, int]]:
        return self.scope.accountant.history

    @property
    def epsilon(self) -> float:
        return self.scope.get_epsilon(DELTA)

    def after(self, passes: int = 1) -> "Charged":
        """Enter, train for some passes, and leave."""
        with self as (model, opt, loader):
            for _ in range(passes):
                train(model, opt, loader)
        return self

    def state(self) -> Any:
        """A copy of all that a step may change."""
        return copy.deepcopy((self.model.state_dict(), self.original.state_dict(), list(self.history)))
