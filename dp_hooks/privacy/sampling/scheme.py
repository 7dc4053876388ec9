"""The sampling scheme: what q is, and how long a pass."""

import math
from collections.abc import Sized
from typing import Any, cast

from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..._validate import bad, fraction, positive_int
from ..accounting.rates import TRUNCATED
from .physical import PhysicalSampler
from .plan import POISSON, SEQUENTIAL, SamplingPlan, largest_batch, plan_of_sizes

_REBUILD = "Build the loader as DataLoader(dataset, batch_size=..., shuffle=True); Poisson sampling replaces its order."


_STREAM = (
    "its dataset is an IterableDataset, from which no example can be drawn independently. Use a map-style one (with __len__ and "
    "__getitem__), as a datasets.Dataset is, or another view of an Arrow table. A stream that fits into memory becomes one by "
    "list(stream), one that fits on the disk by datasets.Dataset.from_generator(lambda: iter(stream)).with_format('torch'). Of a "
    "stream without end, store the examples that are to be trained on first."
)


def plan_sampling(
    loader: object, *, sampling: str = POISSON, sample_rate: object = None, max_batch_size: object = None, secure: bool = False
) -> SamplingPlan:
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
        raise bad("loader", loader, _STREAM)
    poisson, in_order = sampling in (POISSON, TRUNCATED), sampling == SEQUENTIAL
    if max_batch_size is not None and sampling != TRUNCATED:
        raise bad("max_batch_size", max_batch_size, f"it goes with sampling={TRUNCATED!r}, and sampling is {sampling!r}.")
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
    _check_sampler(loader.sampler, examples, in_order)
    if own_rate:
        _check_independent(drawn, examples, sampling)
    if not getattr(loader, "in_order", True):
        raise bad("loader", loader, "it was built with in_order=False; batches must arrive in the order of drawing.")
    if secure and not in_order and (loader.generator or getattr(drawn, "generator", None)) is not None:
        remedy = "with secure_mode=True nobody may be able to draw the batches again. Build the DataLoader without generator=."
        raise bad("loader", loader.generator or drawn.generator, remedy)
    if sample_rate is None and batch_size is not None:
        return plan_of_sizes(examples, batch_size, len(loader), sampling=sampling, max_batch_size=max_batch_size, secure=secure)
    if not poisson:
        raise bad("sample_rate", sample_rate, f"it is the rate of Poisson sampling; leave it out with {_argument(sampling)}.")
    given = drawn.sample_rate if sample_rate is None else sample_rate
    rate = fraction("sample_rate", given, "the probability of an example to be in a batch is in (0, 1].", one_allowed=True)
    batches = math.ceil(1 / rate - 1e-9) if sample_rate is not None else positive_int("steps", drawn.steps)
    most = largest_batch(sampling, max_batch_size, examples, rate)
    return SamplingPlan(examples, rate, rate * examples, batches, sampling, most, secure)


def _argument(sampling: str) -> str:
    return "poisson_sampling=False" if sampling == SEQUENTIAL else f"sampling={sampling!r}"


def _check_independent(sampler: Any, examples: int, sampling: str) -> None:
    """An Opacus sampler of Poisson batches: its rate is taken over, and batches are drawn at it by our own."""
    if sampling not in (POISSON, TRUNCATED):
        what = "the loader draws by Poisson sampling already, as a DPDataLoader does, and has no order of its own to keep. "
        name, value = ("poisson_sampling", False) if sampling == SEQUENTIAL else ("sampling", sampling)
        raise bad(name, value, what + "Pass poisson_sampling=True, or the loader that it was made from.")
    if sampler.num_samples != examples:
        what = f"it draws from {sampler.num_samples} examples, and the dataset has {examples}. "
        raise bad("loader", sampler, what + "Build it with num_samples=len(dataset).")


def _check_sampler(sampler: object, examples: int, in_order: bool) -> None:
    plain = type(sampler) in (RandomSampler, SequentialSampler)
    if isinstance(sampler, WeightedRandomSampler):
        raise bad(
            "loader",
            sampler,
            f"weighted sampling picks some examples more often than the accounting assumes. Weight the loss instead. {_REBUILD}",
        )
    if isinstance(sampler, DistributedSampler):
        remedy = "Leave it out: of several processes each draws the same batches from the whole dataset, and takes its part."
        raise bad("loader", sampler, f"it would give each process a part of the dataset that sampling knows nothing of. {remedy}")
    if not in_order and not plain:
        raise bad(
            "loader",
            sampler,
            "Poisson sampling or random allocation would ignore this sampler and draw from the whole dataset. To train on a part "
            f"of it, pass torch.utils.data.Subset(dataset, indices). {_REBUILD}",
        )
    if not plain and type(sampler) is not SubsetRandomSampler:
        raise bad(
            "loader",
            sampler,
            "without Poisson sampling a pass is charged as one use of each example, in an order that does not depend on the "
            "data. Of this sampler that is not known: sorted by length, say, one example can move all others to another batch. Use "
            "shuffle=True or False, or poisson_sampling=True.",
        )
    if in_order and isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples > examples):
        raise bad(
            "loader",
            sampler,
            "without Poisson sampling a pass is charged as one use of each example, but this sampler can draw an "
            "example several times. Use poisson_sampling=True, or shuffle=True without replacement.",
        )
