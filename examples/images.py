"""Train a small convolutional network on images of digits, with and without privacy.

    python examples/images.py
    python examples/images.py --epsilon 3

Shows a plain loop with ``@dp_step`` on images, GroupNorm in the place of BatchNorm (which mixes examples), and what privacy costs.
Takes about 20 seconds. Prints the test accuracy of the majority class, without privacy and with it; on a terminal
there is a progress bar with the epsilon so far.

Data: 5,000 digits of MNIST, see ``examples/example_data.py``; 4,000 to train on, 1,000 to test with. Both trainings have settings
that are usual for them: without privacy small batches, with privacy large ones and a larger learning rate. These are the first that
were tried: nothing was chosen by looking at results.
"""

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from example_data import majority, progress, split_digits
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


NON_PRIVATE = Settings(epochs=5, batch_size=64, learning_rate=2e-3)
PRIVATE = Settings(epochs=25, batch_size=1000, learning_rate=5e-3)


def build_model(seed: int = 0) -> nn.Module:
    """Return a network of 7 layers for images ``[n, 1, 28, 28]``."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


@dp_step
def train_step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return one loss per image."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(model: nn.Module, data: TensorDataset, settings: Settings) -> None:
    """Train as usual."""
    loader = DataLoader(data, batch_size=settings.batch_size, shuffle=True, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    for epoch in range(settings.epochs):
        for images, labels in progress(loader, f"epoch {epoch + 1}/{settings.epochs}"):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def train_privately(model: nn.Module, data: TensorDataset, settings: Settings, epsilon: float) -> float:
    """Train with differential privacy, and return the epsilon that was spent.

    The generators make the figure repeatable; leave them out for a model that others will see.
    """
    loader = DataLoader(data, batch_size=settings.batch_size, shuffle=True, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    budget = {"target_epsilon": epsilon, "target_delta": DELTA, "epochs": settings.epochs}
    noise = torch.Generator().manual_seed(2)
    scope = private_training(
        model, optimizer, loader, max_grad_norm=1.0, max_physical_batch_size=250, noise_generator=noise, **budget
    )
    with scope as (_, private_loader):
        for epoch in range(settings.epochs):
            for batch in progress(private_loader, f"epoch {epoch + 1}/{settings.epochs}", lambda: scope.get_epsilon(DELTA)):
                train_step(model, batch)
    return scope.get_epsilon(DELTA)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images labelled correctly."""
    return float((model(images).argmax(1) == labels).float().mean())


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="privacy budget")
    parser.add_argument("--epochs", type=int, default=PRIVATE.epochs, help="of the private training")
    parser.add_argument("--batch-size", type=int, default=PRIVATE.batch_size, help="of the private training, expected")
    parser.add_argument("--learning-rate", type=float, default=PRIVATE.learning_rate, help="of the private training")
    parser.add_argument("--examples", type=int, default=5000, help="images to train on and to test with, together")
    return parser.parse_args()


def main() -> None:
    """Train twice."""
    args, begun = arguments(), time.perf_counter()
    data, (images, labels) = split_digits(args.examples)
    print(f"{len(data)} images to train on, {len(labels)} to test with")
    print(f"majority class: test accuracy {majority(labels):.3f}")
    model = build_model()
    train(model, data, NON_PRIVATE)
    print(f"without privacy: test accuracy {accuracy(model, images, labels):.3f}")
    model = build_model()
    spent = train_privately(model, data, Settings(args.epochs, args.batch_size, args.learning_rate), args.epsilon)
    print(f"with epsilon {spent:.2f}, delta {DELTA:g}: test accuracy {accuracy(model, images, labels):.3f}")
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


if __name__ == "__main__":
    main()
