"""Train a Lightning module on images of digits, with and without privacy.

    python examples/lightning_module.py
    python examples/lightning_module.py --epsilon 3

Shows ``private_trainer`` around ``trainer.fit(module)``: the module stays as it is, and the private form has two lines more.
Takes about 20 seconds. Prints the test accuracy of the majority class, without privacy and with it, and the privacy report; on a
terminal Lightning shows its progress bar.

Data and network are those of ``examples/images.py``, where the settings come from as well.
"""

import logging
import sys
import time
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from example_data import majority, split_digits
from example_training import DELTA, accuracy, settings_parser
from images import NON_PRIVATE, PRIVATE, build_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks.integrations import private_trainer


class Digits(L.LightningModule):
    """A classifier of digits."""

    def __init__(self, learning_rate: float) -> None:
        """With Adam at ``learning_rate``."""
        super().__init__()
        self.net = build_model()
        self.learning_rate = learning_rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def trainer_for(epochs: int) -> L.Trainer:
    """Return a trainer that writes no files; its bar is for terminals only."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, enable_progress_bar=sys.stderr.isatty(), **quiet)


def train(module: Digits, data: TensorDataset, epochs: int, batch_size: int) -> None:
    """Train as usual."""
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    trainer = trainer_for(epochs)
    trainer.fit(module, loader)


def train_privately(module: Digits, data: TensorDataset, epochs: int, batch_size: int, epsilon: float) -> str:
    """Train with differential privacy; return the report. The budget is for ``max_epochs``."""
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    trainer = trainer_for(epochs)
    budget = {"target_epsilon": epsilon, "target_delta": DELTA}
    with private_trainer(trainer, module, train_dataloaders=loader, max_grad_norm=1.0, **budget) as scope:
        trainer.fit(module)
    return str(scope.report())


def main() -> None:
    """Train twice."""
    parser = settings_parser(__doc__, PRIVATE)
    parser.add_argument("--examples", type=int, default=5000, help="images to train on and to test with, together")
    args, begun = parser.parse_args(), time.perf_counter()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    data, (images, labels) = split_digits(args.examples)
    print(f"majority class: test accuracy {majority(labels):.3f}")
    module = Digits(NON_PRIVATE.learning_rate)
    train(module, data, NON_PRIVATE.epochs, NON_PRIVATE.batch_size)
    print(f"without privacy: test accuracy {accuracy(module.net, images, labels):.3f}")
    module = Digits(args.learning_rate)
    report = train_privately(module, data, args.epochs, args.batch_size, args.epsilon)
    print(report)
    print(f"with privacy: test accuracy {accuracy(module.net, images, labels):.3f}")
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


if __name__ == "__main__":
    main()
