"""The loader that a private scope hands out."""

import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol, cast

from torch.utils.data import DataLoader

from ...errors import ScopeError
from .empty_batch import EmptyAwareCollate
from .physical import PartSampler, PhysicalBatch
from .poisson import PoissonSampler


class Consumer(Protocol):
    """Who is told about the batches, in the order in which they are handed out."""

    def start_pass(self) -> None:
        """A pass over the loader begins; raise to stop it."""

    def start_part(self, part: PhysicalBatch) -> None:
        """``part`` is about to be handed out."""

    def releases_left(self) -> int | None:
        """Logical batches that the budget still allows; None: no bound."""


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
