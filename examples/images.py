"""Train a small convolutional network on images of digits, with and without privacy.

    python examples/images.py
    python examples/images.py --epsilon 3

Shows the plain loop of ``examples/example_training.py`` with ``@dp_step`` on images, GroupNorm in the place of BatchNorm (which
mixes examples), and what privacy costs. Takes about 20 seconds. Prints the test accuracy of the majority class, without privacy and
with it; on a terminal there is a progress bar with the epsilon so far.

Data: 5,000 digits of MNIST, see ``examples/example_data.py``; 4,000 to train on, 1,000 to test with. Both trainings have settings
that are usual for them: without privacy small batches, with privacy large ones and a larger learning rate. These are the first that
were tried: nothing was chosen by looking at results.
"""

import time

import torch
from example_data import majority, split_digits
from example_training import DELTA, Settings, accuracy, losses_of, settings_of, settings_parser, train, train_privately, train_step
from torch import nn

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


def main() -> None:
    """Train twice."""
    parser = settings_parser(__doc__, PRIVATE)
    parser.add_argument("--examples", type=int, default=5000, help="images to train on and to test with, together")
    args, begun = parser.parse_args(), time.perf_counter()
    data, (images, labels) = split_digits(args.examples)
    print(f"{len(data)} images to train on, {len(labels)} to test with")
    print(f"majority class: test accuracy {majority(labels):.3f}")
    model = build_model()
    train(model, data, NON_PRIVATE, losses_of)
    print(f"without privacy: test accuracy {accuracy(model, images, labels):.3f}")
    model = build_model()
    spent = train_privately(model, data, settings_of(args), args.epsilon, train_step)
    print(f"with epsilon {spent:.2f}, delta {DELTA:g}: test accuracy {accuracy(model, images, labels):.3f}")
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


if __name__ == "__main__":
    main()
