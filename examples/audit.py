"""Audit a private training: what one example can do to it, and what epsilon it has at least.

    python examples/audit.py
    python examples/audit.py --output audit.png

Shows ``dp_hooks.audit`` on the training of ``examples/images.py``, run aside: how far one image moves the clipped sum, in units of
the bound; a loss that compares images with each other, which is found out; and one run with canaries, which bounds epsilon from
below. Takes about 20 seconds. Prints both bounds of epsilon, from above as stated and from below as found, and draws them with
``--output``.

Data: 5,000 digits of MNIST, see ``examples/example_data.py``; 4,000 to train on, of which 2,000 give their places to canaries.
"""

import time

import torch
import torch.nn.functional as F
from example_data import split_digits
from example_training import DELTA, Settings, settings_of, settings_parser, train_step
from images import build_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dp_hooks import dp_step
from dp_hooks.audit import one_run, sensitivity

PRIVATE = Settings(epochs=20, batch_size=400, learning_rate=5e-3)


@dp_step
def contrastive_step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return losses that are wrong with privacy: each image is told from the others in its batch."""
    outputs = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(5 * outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


def main() -> None:
    """Measure sensitivities, and audit a run."""
    parser = settings_parser(__doc__, PRIVATE)
    parser.add_argument("--examples", type=int, default=5000, help="images to train on and to test with, together")
    parser.add_argument("--output", help="file for the picture (.png, .pdf, .svg); needs matplotlib")
    args, begun = parser.parse_args(), time.perf_counter()
    settings, (data, _) = settings_of(args), split_digits(args.examples)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    loader = DataLoader(data, batch_size=settings.batch_size, shuffle=True)
    run = {"max_grad_norm": 1.0, "accountant": "pld"}

    for step, what in ((train_step, "one loss for each image"), (contrastive_step, "a loss that compares images")):
        print(f"{what}:")
        print(sensitivity(step, model, optimizer, loader, batches=2, examples=10, seed=0, noise_multiplier=1.0, **run))

    budget = {"target_epsilon": args.epsilon, "target_delta": DELTA, "epochs": settings.epochs}
    found = one_run(train_step, model, optimizer, loader, seed=0, **budget, **run)
    print(found)
    if args.output:
        found.plot(args.output)
        print(f"drawn: {args.output}")
    print(f"epsilon is {found.epsilon:.2f} at most, as stated, and {found.epsilon_lower:.2f} at least, as found")
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


if __name__ == "__main__":
    main()
