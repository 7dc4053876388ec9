"""Drawing batches: Poisson sampling, physical parts of logical batches, batches with no example in them."""

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from ..._tree import tree_map
from ..._validate import bad, fraction
from ...errors import DPHooksError, ScopeError
from ..noise.gaussian import fresh_generator


@dataclass(frozen=True)
class PhysicalBatch:
    """What the loader knows of a batch it hands out.

    Attributes:
        logical: running number of the logical batch it belongs to.
        index: position among the physical parts of that logical batch.
        size: number of examples in it; 0 if Poisson sampling drew none.
        last: whether it completes the logical batch.
    """

    logical: int
    index: int
    size: int
    last: bool


class Consumer(Protocol):
    """Who is told about the batches, in the order in which they are handed out."""

    def start_pass(self) -> None:
        """A pass over the loader begins; raise to stop it."""

    def start_part(self, part: PhysicalBatch) -> None:
        """``part`` is about to be handed out."""

    def releases_left(self) -> int | None:
        """Logical batches that the budget still allows; None: no bound."""


class PoissonSampler(Sampler[list[int]]):
    """Draws logical batches in which every example is present independently with probability ``sample_rate``.

    This is the sampling that privacy amplification is proved for (Abadi et al., CCS 2016; Mironov et al., 2019,
    arXiv:1908.10530). The size of a batch varies and can be 0. The draw is made in float64: a float32 uniform has a
    granularity of 6e-8, which would be off by percents at rates near 1e-6.
    """

    def __init__(
        self, examples: int, sample_rate: float, batches: int, generator: torch.Generator | None = None
    ) -> None:
        """Draw ``batches`` index lists from ``range(examples)`` a pass; without ``generator`` from fresh entropy."""
        self.examples = examples
        self.sample_rate = sample_rate
        self.batches = batches
        self.generator = generator if generator is not None else fresh_generator(torch.device("cpu"))

    def __len__(self) -> int:
        """Logical batches in a pass."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        """Draw the batches of one pass."""
        for _ in range(self.batches):
            uniform = torch.rand(self.examples, dtype=torch.float64, generator=self.generator)
            yield (uniform < self.sample_rate).nonzero().flatten().tolist()


class OncePerPass(Sampler[list[int]]):
    """Hands on the batches of an ordinary sampler and stops at the first example that appears twice in a pass."""

    def __init__(self, batches: "Sampler[list[int]] | BatchSampler") -> None:
        """Guard ``batches``."""
        self.batches = batches

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(cast(Sized, self.batches))

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over one pass."""
        seen: set[Any] = set()
        for batch in self.batches:
            before = len(seen)
            seen.update(batch)
            if len(seen) != before + len(batch):
                raise ScopeError(
                    "the sampler yields an example more than once in a pass, but without Poisson sampling a pass is "
                    "charged as one use of each example. Use poisson_sampling=True, or a sampler without replacement."
                )
            yield list(batch)


class PartSampler(Sampler[list[int]]):
    """Splits logical batches into physical ones and keeps, per pass, a queue that says which part is which.

    Loader workers fetch ahead of the training loop, so the queue is filled when indices are drawn and read when batches
    arrive; DataLoader returns them in the order of drawing.
    """

    def __init__(
        self,
        logical: "PoissonSampler | OncePerPass",
        expected: float,
        max_size: int | None,
        limit: Callable[[], int | None],
    ) -> None:
        """Split the batches of ``logical`` (``expected`` examples each) into parts of at most ``max_size``.

        ``limit`` is asked at the start of a pass how many logical batches it may have.
        """
        self.logical = logical
        self.max_size = max_size
        self.limit = limit
        self.queue: deque[PhysicalBatch] = deque()
        self._serial = 0
        self._per_batch = 1 if max_size is None else max(1, math.ceil(expected / max_size))

    def __len__(self) -> int:
        """Expected number of parts in a pass (exact if there are no physical batches and no budget ends it)."""
        return len(self.logical) * self._per_batch

    def __iter__(self) -> Iterator[list[int]]:
        """Begin a pass with a queue of its own."""
        self.queue = deque()
        return self._parts(self.queue, self.limit())

    def _parts(self, queue: deque[PhysicalBatch], limit: int | None) -> Iterator[list[int]]:
        if limit == 0:
            return
        for count, indices in enumerate(self.logical, start=1):
            self._serial += 1
            serial, step = self._serial, self.max_size or max(1, len(indices))
            chunks = [indices[i : i + step] for i in range(0, len(indices), step)] or [[]]
            for index, chunk in enumerate(chunks):
                queue.append(PhysicalBatch(serial, index, len(chunk), index == len(chunks) - 1))
                yield chunk
            if limit is not None and count >= limit:
                return


class EmptyAwareCollate:
    """A collate function that also makes batches of no example, with the structure that other batches have.

    The structure is learnt by collating the first example of the dataset once alone and once twice: every axis whose
    size differs counts examples and becomes 0. Nothing of the example's content is kept: what remains are zeros. It
    works in loader workers, and when the very first batch is empty.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], dataset: Any) -> None:
        """Wrap ``collate_fn``."""
        self.collate_fn = collate_fn
        self.dataset = dataset

    def __call__(self, examples: list[Any]) -> Any:
        """Collate ``examples``; an empty list gives a batch with zero rows."""
        if len(examples) > 0:
            return self.collate_fn(examples)
        example = self.dataset[0]
        # Copies, since collate functions may consume what they are given.
        one = self.collate_fn([copy.deepcopy(example)])
        two = self.collate_fn([copy.deepcopy(example), copy.deepcopy(example)])
        return tree_map(_no_rows, one, two)


def _no_rows(one: Any, two: Any) -> Any:
    if isinstance(one, Tensor):
        shape = [0 if a != b else a for a, b in zip(one.shape, two.shape, strict=True)]
        return torch.zeros(shape, dtype=one.dtype, device=one.device)
    if hasattr(one, "shape") and hasattr(one, "dtype"):  # numpy and friends, without importing them
        blank = one[tuple(slice(0 if a != b else None) for a, b in zip(one.shape, two.shape, strict=True))].copy()
        blank.fill(0)
        return blank
    if isinstance(one, (list, tuple)):  # of different lengths: one entry per example
        return type(one)()
    if one is None or (isinstance(one, bool) and one == two):
        return one
    if isinstance(one, (int, float, str, bytes)):
        return type(one)()
    raise DPHooksError(
        f"cannot make an empty batch: collate_fn returned a {type(one).__name__} in it. Let collate_fn return tensors, "
        "lists, tuples, mappings or dataclasses of them."
    )


class PrivateDataLoader(DataLoader[Any]):
    """The loader a private scope hands out: same dataset, collate function and workers, but private batches.

    Attributes:
        sample_rate: q, the probability of an example to be in a batch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: PartSampler,
        consumer: Consumer,
        sample_rate: float,
    ) -> None:
        """Take everything but the sampling from ``loader``."""
        self.sample_rate = sample_rate
        self._consumer = consumer
        self._poisson = isinstance(sampler.logical, PoissonSampler)
        self._pass: deque[PhysicalBatch] | None = None
        super().__init__(
            loader.dataset,
            batch_sampler=sampler,
            collate_fn=EmptyAwareCollate(loader.collate_fn, loader.dataset),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            pin_memory_device=loader.pin_memory_device,
        )

    def __iter__(self) -> Any:
        """Begin a pass: yields batches, in the structure of the original loader's."""
        sampler = cast(PartSampler, self.batch_sampler)
        if self._consumer.releases_left() == 0:
            warnings.warn("the privacy budget is used up: the loader yields no more batches", stacklevel=2)
        batches = super().__iter__()
        return self._hand_out(batches, sampler.queue)

    def close(self) -> None:
        """Stop persistent workers, which would otherwise outlive the scope."""
        workers, self._iterator = self._iterator, None
        if workers is not None and hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()

    def _hand_out(self, batches: Iterator[Any], queue: deque[PhysicalBatch]) -> Iterator[Any]:
        started = False
        for batch in batches:
            if not started:
                self._consumer.start_pass()
                started, self._pass = True, queue
            if self._pass is not queue and not self._poisson:
                raise ScopeError(
                    "two passes over the private loader are interleaved; without Poisson sampling a pass is charged at its "
                    "start, with the noise of that moment. Finish or leave one pass before beginning the next."
                )
            self._consumer.start_part(queue.popleft())
            yield batch


@dataclass(frozen=True)
class SamplingPlan:
    """How batches will be drawn from a loader; made by :func:`plan_sampling` without touching anything.

    Attributes:
        examples: N, the number of examples in the dataset.
        sample_rate: q, the probability of one example to be in one logical batch.
        expected_batch_size: ``q * N``, the denominator of "mean". Not rounded.
        batches_per_pass: logical batches in one pass over the loader.
        poisson: Poisson sampling, or the loader's own order.
    """

    examples: int
    sample_rate: float
    expected_batch_size: float
    batches_per_pass: int
    poisson: bool

    def releases(self, epochs: float) -> int:
        """Return how often noise is released in ``epochs`` passes: per batch with Poisson sampling, else per pass."""
        return math.ceil(epochs * (self.batches_per_pass if self.poisson else 1) - 1e-9)

    @property
    def charged_rate(self) -> float:
        """The sampling rate that one release is charged with."""
        return self.sample_rate if self.poisson else 1.0


_REBUILD = "Build the loader as DataLoader(dataset, batch_size=..., shuffle=True); Poisson sampling replaces its order."


def plan_sampling(loader: object, *, poisson: bool, sample_rate: object = None) -> SamplingPlan:
    """Check ``loader`` and work out q, the expected batch size and the length of a pass.

    Raises:
        InvalidArgumentError: not a map-style DataLoader with a ``batch_size``, an empty dataset, a batch larger than
            the dataset, or a sampler whose batches cannot be accounted for.
    """
    if not isinstance(loader, DataLoader):
        raise bad("loader", loader, "pass the torch.utils.data.DataLoader with the training data.")
    if isinstance(loader, PrivateDataLoader):
        raise bad("loader", loader, "it is a private loader already; pass the DataLoader it was made from.")
    if isinstance(loader.dataset, IterableDataset):
        raise bad(
            "loader",
            loader,
            "its dataset is an IterableDataset, from which no example can be drawn independently. "
            "Use a map-style dataset (with __len__ and __getitem__), or store the stream in one first.",
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        what = "batch_size=None" if loader.batch_sampler is None else "a batch_sampler of its own"
        raise bad("loader", loader, f"it has {what}, so the sampling rate is unknown. {_REBUILD}")
    examples = len(cast(Sized, loader.dataset))
    if examples == 0:
        raise bad("loader", loader, "its dataset is empty; there is nothing to train on.")
    if loader.batch_size > examples:
        raise bad(
            "loader", loader, f"its batch_size={loader.batch_size} is larger than the dataset of {examples} examples."
        )
    _check_sampler(loader.sampler, examples, poisson)
    if not getattr(loader, "in_order", True):
        raise bad("loader", loader, "it was built with in_order=False; batches must arrive in the order of drawing.")
    if sample_rate is None:
        return SamplingPlan(examples, loader.batch_size / examples, float(loader.batch_size), len(loader), poisson)
    if not poisson:
        raise bad(
            "sample_rate", sample_rate, "it is the rate of Poisson sampling; leave it out with poisson_sampling=False."
        )
    rate = fraction(
        "sample_rate", sample_rate, "the probability of an example to be in a batch is in (0, 1].", one_allowed=True
    )
    return SamplingPlan(examples, rate, rate * examples, math.ceil(1 / rate - 1e-9), poisson)


def _check_sampler(sampler: object, examples: int, poisson: bool) -> None:
    plain = type(sampler) in (RandomSampler, SequentialSampler)
    if isinstance(sampler, WeightedRandomSampler):
        raise bad(
            "loader",
            sampler,
            "weighted sampling picks some examples more often than the accounting assumes. "
            f"Weight the loss instead. {_REBUILD}",
        )
    if poisson and not plain:
        raise bad(
            "loader",
            sampler,
            "Poisson sampling would ignore this sampler and draw from the whole dataset. To train on a part of it, pass "
            f"torch.utils.data.Subset(dataset, indices). {_REBUILD}",
        )
    if not poisson and isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples > examples):
        raise bad(
            "loader",
            sampler,
            "without Poisson sampling a pass is charged as one use of each example, but this sampler can draw an "
            "example several times. Use poisson_sampling=True, or shuffle=True without replacement.",
        )


def make_loader(
    loader: DataLoader[Any], plan: SamplingPlan, consumer: Consumer, max_physical_batch_size: int | None
) -> PrivateDataLoader:
    """Build the private loader for ``plan`` and report its batches to ``consumer``."""
    logical: PoissonSampler | OncePerPass
    if plan.poisson:
        logical = PoissonSampler(plan.examples, plan.sample_rate, plan.batches_per_pass, loader.generator)
    else:
        logical = OncePerPass(cast(BatchSampler, loader.batch_sampler))

    def limit() -> int | None:
        left = consumer.releases_left()
        if left is None or plan.poisson:
            return left
        return 0 if left == 0 else None  # a pass that has begun is paid for as a whole

    parts = PartSampler(logical, plan.expected_batch_size, max_physical_batch_size, limit)
    return PrivateDataLoader(loader, parts, consumer, plan.sample_rate)
