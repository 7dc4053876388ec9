"""A run to be audited: data, a model, loops over it, right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import audit, dp_step

from ..models import drawn

Train = Callable[..., Any]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Tokens of a small vocabulary, an embedding that is used twice, and a classifier with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 20)
        self.mix = nn.Linear(20, 20)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 3)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embedding(ids)
        tokens = tokens + torch.tanh(self.mix(self.embedding(ids.flip(1))))
        return self.head(self.norm(tokens).mean(1))


def data(examples: int) -> TensorDataset:
    """Rows of six tokens, and labels."""
    ids = torch.randint(0, 100, (examples, 6), generator=drawn(1))
    return TensorDataset(ids, ids[:, 0] % 3)


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a loop that is right."""
    return F.cross_entropy(model(x), y)


def loop(loss: Loss = right, passes: int = 1) -> Train:
    """Return the loop over so many passes with that loss."""

    def train(model: nn.Module, opt: Any, loader: Any) -> None:
        for _ in range(passes):
            for x, y in loader:
                opt.zero_grad()
                loss(model, x, y).backward()
                opt.step()

    return train


@dp_step
def step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """A decorated step that is right."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def made(examples: int, batch_size: int, *, secure: bool = False) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """Return a model, an optimizer with momentum and a loader, from fixed seeds."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, optimizer, DataLoader(data(examples), batch_size=batch_size, shuffle=True, generator=None if secure else drawn(4))


def measured(train: Train | None = None, examples: int = 60, batch_size: int = 12, **options: Any) -> audit.Sensitivity:
    """Measure the sensitivity in a small run."""
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "accountant": "rdp", **options}
    return audit.sensitivity(
        train or loop(), *made(examples, batch_size, secure="secure_mode" in options), batches=2, examples=8, seed=0, **settings
    )


def audited(train: Train | None = None, examples: int = 800, batch_size: int = 200, seed: int = 0, **options: Any) -> audit.OneRun:
    """Audit a run of 60 steps, or what the options say, at an epsilon of about 8."""
    settings: dict[str, Any] = {"noise_multiplier": 1.42, "max_grad_norm": 1.0, "accountant": "pld", **options}
    if "secure_mode" not in settings:
        settings.setdefault("noise_generator", drawn(10 + seed))
    return audit.one_run(
        train or loop(passes=15),
        *made(examples, batch_size, secure="secure_mode" in options),
        seed=seed,
        delta=1e-5,
        self_check=False,
        **settings,
    )
