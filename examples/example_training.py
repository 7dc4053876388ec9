"""What the smaller examples share: their settings, and a plain loop with and without privacy.

    python examples/example_training.py

Shows the two loops side by side, on made-up data when it is run. Takes a few seconds. Prints the accuracy of the majority class,
without privacy and with it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from example_data import majority, progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import dp_step, private_training

DELTA = 1e-5


@dataclass(frozen=True)
class Settings:
    """Passes, batch size, and Adam's learning rate."""

    epochs: int
    batch_size: int
    learning_rate: float


def settings_parser(description: str, private: Settings) -> argparse.ArgumentParser:
    """Return a parser of epsilon, and of what is in ``private``, the settings that are usual with privacy."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="privacy budget")
    parser.add_argument("--epochs", type=int, default=private.epochs, help="of the private training")
    parser.add_argument("--batch-size", type=int, default=private.batch_size, help="of the private training, expected")
    parser.add_argument("--learning-rate", type=float, default=private.learning_rate, help="of the private training")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """Return what was parsed."""
    return Settings(args.epochs, args.batch_size, args.learning_rate)


def train(model: nn.Module, data: TensorDataset, settings: Settings, losses_of: Callable[[Any, list[Tensor]], Tensor]) -> None:
    """Train as usual; ``losses_of(model, batch)`` returns one loss for each example."""
    loader = DataLoader(data, batch_size=settings.batch_size, shuffle=True, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    for epoch in range(settings.epochs):
        for batch in progress(loader, f"epoch {epoch + 1}/{settings.epochs}"):
            optimizer.zero_grad()
            losses_of(model, batch).mean().backward()
            optimizer.step()


def train_privately(
    model: nn.Module,
    data: TensorDataset,
    settings: Settings,
    epsilon: float,
    train_step: Callable[[Any, list[Tensor]], Tensor],
    max_physical_batch_size: int = 250,
) -> float:
    """Train with differential privacy by a ``@dp_step`` function, and return the epsilon that was spent.

    The generators make the figure repeatable; leave them out for a model that others will see.
    """
    loader = DataLoader(data, batch_size=settings.batch_size, shuffle=True, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    budget = {"target_epsilon": epsilon, "target_delta": DELTA, "epochs": settings.epochs}
    how = {"max_grad_norm": 1.0, "max_physical_batch_size": max_physical_batch_size}
    scope = private_training(model, optimizer, loader, noise_generator=torch.Generator().manual_seed(2), **how, **budget)
    with scope as (_, private_loader):
        for epoch in range(settings.epochs):
            for batch in progress(private_loader, f"epoch {epoch + 1}/{settings.epochs}", lambda: scope.get_epsilon(DELTA)):
                train_step(model, batch)
    return scope.get_epsilon(DELTA)


def losses_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return one loss per example of a classifier."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@dp_step
def train_step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return one loss per example."""
    return losses_of(model, batch)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the share of examples labelled correctly."""
    return float((model(inputs).argmax(1) == labels).float().mean())


def main() -> None:
    """Train twice on points that a line divides."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(5000, 10, generator=draw)
    labels = (inputs.sum(1) + torch.randn(5000, generator=draw) > 0).long()
    data, test = TensorDataset(inputs[:4000], labels[:4000]), (inputs[4000:], labels[4000:])
    print(f"majority class: test accuracy {majority(test[1]):.3f}")
    model = nn.Linear(10, 2)
    train(model, data, Settings(5, 100, 1e-2), losses_of)
    print(f"without privacy: test accuracy {accuracy(model, *test):.3f}")
    model = nn.Linear(10, 2)
    spent = train_privately(model, data, Settings(10, 500, 2e-2), 3.0, train_step)
    print(f"with epsilon {spent:.2f}, delta {DELTA:g}: test accuracy {accuracy(model, *test):.3f}")


if __name__ == "__main__":
    main()
