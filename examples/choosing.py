"""What to choose: epsilon, learning rate, batch size, clipping bound and epochs, measured over several seeds.

    python examples/choosing.py
    python examples/choosing.py --quick

Shows how the accuracy of one small model on made-up data depends on each choice, so that a first private run of yours starts
from sensible values. Nothing is downloaded. Takes six and a half minutes of processor time in two processes, and 18 seconds
with ``--quick`` (which is there to see that the script runs: its figures mean nothing). Prints two tables in Markdown, the
first for learning rate and batch size, the second for everything else, changed one at a time. A cell is the mean accuracy
over the seeds, with the smallest and the largest in brackets.

Data: 12,000 examples of 64 numbers, 10,000 of them to train on. Each of 10 classes consists of ten clusters around
random points, so a linear model does not do. Model: 64-64-10 with ReLU, 4,810 parameters, trained by Adam. The seed draws data,
weights, batches and noise.

On private data such a table could not be had for nothing: every run that is looked at in order to choose adds to what
is revealed, and no epsilon of a single run covers that. Choose on public data that is like yours, or on made-up data.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import private_training

FEATURES, CLASSES, CLUSTERS, HIDDEN = 64, 10, 10, 64
NOISE = 1.2  # standard deviation within a cluster; the points that clusters lie around have 1
LEARNING_RATES = (1e-3, 4e-3, 1.6e-2)
BATCH_SIZES = (64, 256, 1024)
EPSILONS = (3.0, 8.0)
DELTA = 1e-5


@dataclass(frozen=True)
class Choice:
    """What a run is made with; ``epsilon`` None is training without privacy."""

    epsilon: float | None = 8.0
    batch_size: int = 256
    learning_rate: float = 4e-3
    max_grad_norm: float = 1.0
    epochs: int = 10
    clipping: str = "flat"


def make_data(examples: int, seed: int) -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Return five sixths of ``examples`` to train on, and the others to measure accuracy with."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, CLUSTERS, FEATURES, generator=draw)
    labels = torch.randint(CLASSES, (examples,), generator=draw)
    clusters = torch.randint(CLUSTERS, (examples,), generator=draw)
    inputs = centres[labels, clusters] + NOISE * torch.randn(examples, FEATURES, generator=draw)
    cut = examples * 5 // 6
    return TensorDataset(inputs[:cut], labels[:cut]), (inputs[cut:], labels[cut:])


def make_model(seed: int) -> nn.Module:
    """Return the model with the weights of ``seed``."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


@cache
def noise_for(epsilon: float, examples: int, batch_size: int, epochs: int) -> float:
    """Return the noise multiplier for a budget: the same for all runs that differ in something else only."""
    model = make_model(0)
    loader = DataLoader(TensorDataset(torch.zeros(examples, FEATURES)), batch_size=batch_size)
    budget = {"target_epsilon": epsilon, "target_delta": DELTA, "epochs": epochs}
    return private_training(model, torch.optim.Adam(model.parameters()), loader, max_grad_norm=1.0, **budget).noise_multiplier


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, epochs: int) -> None:
    """Run the loop, which is the same with and without privacy."""
    criterion = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()


def accuracy_of(choice: Choice, noise_multiplier: float | None, examples: int, seed: int) -> float:
    """Train once and return the accuracy on the examples held out."""
    data, (inputs, labels) = make_data(examples, seed)
    model = make_model(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=choice.learning_rate)
    order = torch.Generator().manual_seed(seed + 1000)  # repeatable; leave both generators out for a model others will see
    loader = DataLoader(data, batch_size=choice.batch_size, shuffle=True, generator=order)
    if noise_multiplier is None:
        train(model, optimizer, loader, choice.epochs)
    else:
        with private_training(
            model,
            optimizer,
            loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=choice.max_grad_norm,
            clipping=choice.clipping,
            noise_generator=torch.Generator().manual_seed(seed + 2000),
        ) as (private_optimizer, private_loader):
            train(model, private_optimizer, private_loader, choice.epochs)
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def cell(accuracies: list[float]) -> str:
    """Return mean, smallest and largest."""
    return f"{statistics.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})"


def rows_of(base: Choice) -> dict[str, Choice]:
    """Return the rows of the second table: one thing changed at a time."""
    return {
        "as it is": base,
        "C = 0.1": replace(base, max_grad_norm=0.1),
        "C = 10": replace(base, max_grad_norm=10.0),
        "automatic clipping, C = 1": replace(base, clipping="automatic"),
        "3 epochs": replace(base, epochs=3),
        "30 epochs": replace(base, epochs=30),
        "epsilon 1": replace(base, epsilon=1.0),
        "epsilon 3": replace(base, epsilon=3.0),
        "without privacy": replace(base, epsilon=None),
        "without privacy, the usual batch 64 and 1e-3": replace(base, epsilon=None, batch_size=64, learning_rate=1e-3),
    }


class Runs:
    """Starts the runs of a table in processes of their own, and hands out the cells in order."""

    def __init__(self, jobs: int, examples: int, seeds: int) -> None:
        """Use ``jobs`` processes; 1 is this one."""
        self.examples, self.seeds = examples, seeds
        self._pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) if jobs > 1 else None

    def start(self, choice: Choice) -> Callable[[], str]:
        """Start the runs of a cell, and return a function that waits for its text."""
        private, train_on = choice.epsilon is not None, self.examples * 5 // 6
        sigma = noise_for(choice.epsilon, train_on, choice.batch_size, choice.epochs) if private else None
        given = [(choice, sigma, self.examples, seed) for seed in range(self.seeds)]
        if self._pool is None:
            return lambda: cell([accuracy_of(*each) for each in given])
        futures = [self._pool.submit(accuracy_of, *each) for each in given]
        return lambda: cell([future.result() for future in futures])


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds each figure is measured with")
    parser.add_argument("--epochs", type=int, default=10, help="of both tables, where nothing else is said")
    parser.add_argument("--batch-size", type=int, default=1024, help="of the second table")
    parser.add_argument("--learning-rate", type=float, default=1.6e-2, help="of the second table")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each; more do not change the figures")
    parser.add_argument("--quick", action="store_true", help="one seed, few examples, one epoch: only shows that it runs")
    return parser.parse_args()


def main() -> None:
    """Measure and print the tables."""
    args, start = arguments(), time.perf_counter()
    torch.set_num_threads(1)  # steps as small as these are not faster on several
    seeds, examples, epochs, jobs = (1, 1500, 1, 1) if args.quick else (args.seeds, 12_000, args.epochs, args.jobs)
    sizes, epsilons = (BATCH_SIZES[-1:], EPSILONS[-1:]) if args.quick else (BATCH_SIZES, EPSILONS)
    runs, base = Runs(jobs, examples, seeds), Choice(epochs=epochs)
    grid = {
        size: [
            runs.start(replace(base, epsilon=epsilon, batch_size=size, learning_rate=rate))
            for epsilon in epsilons
            for rate in LEARNING_RATES
        ]
        for size in sizes
    }
    base = replace(base, batch_size=args.batch_size, learning_rate=args.learning_rate)
    changed = {name: runs.start(replace(choice, epochs=1) if args.quick else choice) for name, choice in rows_of(base).items()}

    print(f"{examples * 5 // 6} examples, {epochs} epochs, delta {DELTA:g}, C = 1; {seeds} seed(s); batch sizes in the rows\n")
    heads = [f"epsilon {epsilon:g}, lr {rate:g}" for epsilon in epsilons for rate in LEARNING_RATES]
    print("| batch | " + " | ".join(heads) + " |\n" + "| --- " * (1 + len(heads)) + "|", flush=True)
    for size, line in grid.items():
        print(f"| {size} | " + " | ".join(text() for text in line) + " |", flush=True)
    print(f"\nepsilon {base.epsilon:g}, batch {base.batch_size}, learning rate {base.learning_rate:g}, and one thing changed:\n")
    print("| | accuracy |\n| --- | --- |", flush=True)
    for name, text in changed.items():
        print(f"| {name} | {text()} |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
