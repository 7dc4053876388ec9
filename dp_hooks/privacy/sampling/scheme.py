"""The sampling scheme: what q is, and how long a pass."""

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..._validate import bad, fraction, positive_int
from .physical import PhysicalSampler


@dataclass(frozen=True)
class SamplingPlan:
    """How batches will be drawn from a loader; made by :func:`plan_sampling` without touching anything.

    Attributes:
        examples: N, the number of examples in the dataset.
        sample_rate: q, the probability of one example to be in one logical batch.
        expected_batch_size: ``q * N``, the denominator of "mean". Not rounded.
        batches_per_pass: logical batches in one pass over the loader.
        poisson: Poisson sampling, or the loader's own order.
        secure: whether Poisson sampling draws from bits that nobody can predict.
    """

    examples: int
    sample_rate: float
    expected_batch_size: float
    batches_per_pass: int
    poisson: bool
    secure: bool = False

    def releases(self, epochs: float) -> int:
        """Return how often noise is released in ``epochs`` passes: per batch with Poisson sampling, else per pass."""
        return math.ceil(epochs * (self.batches_per_pass if self.poisson else 1) - 1e-9)

    @property
    def charged_rate(self) -> float:
        """The sampling rate that one release is charged with."""
        return self.sample_rate if self.poisson else 1.0


_REBUILD = "Build the loader as DataLoader(dataset, batch_size=..., shuffle=True); Poisson sampling replaces its order."


def plan_sampling(loader: object, *, poisson: bool, sample_rate: object = None, secure: bool = False) -> SamplingPlan:
    """Check ``loader`` and work out q, the expected batch size and the length of a pass: those of a ``DPDataLoader`` are its own.

    Raises:
        InvalidArgumentError: not a map-style DataLoader with a ``batch_size``, an empty dataset, a batch larger than
            the dataset, a sampler whose batches cannot be accounted for, or, if ``secure``, a generator that could repeat them.
    """
    if not isinstance(loader, DataLoader):
        raise bad("loader", loader, "pass the torch.utils.data.DataLoader with the training data.")
    if isinstance(loader.batch_sampler, PhysicalSampler):
        raise bad("loader", loader, "it is a private loader already; pass the DataLoader it was made from.")
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise bad(
            "loader",
            type(loader).__name__,
            "it is a subclass of DataLoader with an __iter__ of its own, which the private loader would not run. Do what it does "
            "in the training loop, in collate_fn, or in the dataset, and pass a plain DataLoader (one that accelerate has not "
            "prepared yet).",
        )
    if isinstance(loader.dataset, IterableDataset):
        raise bad(
            "loader",
            loader,
            "its dataset is an IterableDataset, from which no example can be drawn independently. "
            "Use a map-style dataset (with __len__ and __getitem__), or store the stream in one first.",
        )
    drawn: Any = loader.batch_sampler
    own_rate = type(drawn) is UniformWithReplacementSampler
    batch_size = loader.batch_size
    if not own_rate and (batch_size is None or type(drawn) is not BatchSampler):
        what = "batch_size=None" if drawn is None else "a batch_sampler of its own"
        raise bad("loader", loader, f"it has {what}, so the sampling rate is unknown. {_REBUILD}")
    examples = len(cast(Sized, loader.dataset))
    if examples == 0:
        raise bad("loader", loader, "its dataset is empty; there is nothing to train on.")
    if batch_size is not None and batch_size > examples:
        raise bad("loader", loader, f"its batch_size={batch_size} is larger than the dataset of {examples} examples.")
    _check_sampler(loader.sampler, examples, poisson)
    if own_rate:
        _check_independent(drawn, examples, poisson)
    if not getattr(loader, "in_order", True):
        raise bad("loader", loader, "it was built with in_order=False; batches must arrive in the order of drawing.")
    if secure and poisson and (loader.generator or getattr(drawn, "generator", None)) is not None:
        remedy = "with secure_mode=True nobody may be able to draw the batches again. Build the DataLoader without generator=."
        raise bad("loader", loader.generator or drawn.generator, remedy)
    if sample_rate is None and batch_size is not None:
        return SamplingPlan(examples, batch_size / examples, float(batch_size), len(loader), poisson, secure)
    if not poisson:
        raise bad("sample_rate", sample_rate, "it is the rate of Poisson sampling; leave it out with poisson_sampling=False.")
    given = drawn.sample_rate if sample_rate is None else sample_rate
    rate = fraction("sample_rate", given, "the probability of an example to be in a batch is in (0, 1].", one_allowed=True)
    batches = math.ceil(1 / rate - 1e-9) if sample_rate is not None else positive_int("steps", drawn.steps)
    return SamplingPlan(examples, rate, rate * examples, batches, poisson, secure)


def _check_independent(sampler: Any, examples: int, poisson: bool) -> None:
    """An Opacus sampler of Poisson batches: its rate is taken over, and batches are drawn at it by our own."""
    if not poisson:
        what = "the loader draws by Poisson sampling already, as a DPDataLoader does, and has no order of its own to keep. "
        raise bad("poisson_sampling", False, what + "Pass poisson_sampling=True, or the loader that it was made from.")
    if sampler.num_samples != examples:
        what = f"it draws from {sampler.num_samples} examples, and the dataset has {examples}. "
        raise bad("loader", sampler, what + "Build it with num_samples=len(dataset).")


def _check_sampler(sampler: object, examples: int, poisson: bool) -> None:
    plain = type(sampler) in (RandomSampler, SequentialSampler)
    if isinstance(sampler, WeightedRandomSampler):
        raise bad(
            "loader",
            sampler,
            f"weighted sampling picks some examples more often than the accounting assumes. Weight the loss instead. {_REBUILD}",
        )
    if poisson and not plain:
        raise bad(
            "loader",
            sampler,
            "Poisson sampling would ignore this sampler and draw from the whole dataset. To train on a part of it, pass "
            f"torch.utils.data.Subset(dataset, indices). {_REBUILD}",
        )
    if not plain and type(sampler) is not SubsetRandomSampler:
        raise bad(
            "loader",
            sampler,
            "without Poisson sampling a pass is charged as one use of each example, in an order that does not depend on the "
            "data. Of this sampler that is not known: sorted by length, say, one example can move all others to another batch. Use "
            "shuffle=True or False, or poisson_sampling=True.",
        )
    if not poisson and isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples > examples):
        raise bad(
            "loader",
            sampler,
            "without Poisson sampling a pass is charged as one use of each example, but this sampler can draw an "
            "example several times. Use poisson_sampling=True, or shuffle=True without replacement.",
        )
