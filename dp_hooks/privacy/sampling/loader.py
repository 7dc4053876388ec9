"""The loader that a private scope hands out."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.utils.data import BatchSampler, DataLoader

from ...errors import ScopeError
from ..accounting.meter import PrivacyMeter
from ..accounting.rates import ALLOCATION
from .allocation import AllocationSampler
from .empty_batch import EmptyAwareCollate
from .physical import LogicalBatches, OncePerPass, PartOfEach, Pass, PhysicalBatch, PhysicalSampler, SharedDraws
from .plan import SEQUENTIAL, SamplingPlan
from .poisson import PoissonSampler, SecurePoissonSampler
from .split import Split
from .unit_batches import UnitPhysicalSampler, UnitSampler

_KEPT = (
    "num_workers pin_memory timeout worker_init_fn multiprocessing_context generator prefetch_factor persistent_workers "
    "pin_memory_device"
).split()


def own_generator(loader: DataLoader[Any]) -> torch.Generator | None:
    """The generator that the user's loader draws by, if it was given one."""
    found: torch.Generator | None = loader.generator or getattr(loader.batch_sampler, "generator", None)  # of Opacus's sampler
    return found


class PrivateDataLoader(DataLoader[Any]):
    """The loader a private scope hands out: same dataset, collate function and workers, but private batches.

    Attributes:
        sample_rate: q, the probability of an example, or of a unit, to be in a batch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        plan: SamplingPlan,
        meter: PrivacyMeter,
        before_batch: Callable[[PhysicalBatch, Any], None],
        max_physical_batch_size: int | None,
        split: Split,
        place: Callable[[Any], Any] | None = None,
        shared: SharedDraws | None = None,
    ) -> None:
        """Take everything but the sampling, which is that of ``plan``, from ``loader``.

        ``meter`` is told when a pass begins, and may refuse it; ``before_batch`` is called with a batch before it is handed out,
        and after ``place`` has put it where the model is; ``split`` is for other loaders that are built of the sampler and the
        collate function of this one; ``shared`` is there where several processes have parts of one batch.
        """
        logical: LogicalBatches
        generator = own_generator(loader) if shared is None else shared.generator
        if plan.sampling == SEQUENTIAL:
            logical = OncePerPass(cast(BatchSampler, loader.batch_sampler))
        elif plan.sampling == ALLOCATION:
            sizes = (plan.examples, plan.batches_per_pass)
            logical = AllocationSampler.secure(*sizes) if plan.secure else AllocationSampler(*sizes, generator)
        else:
            drawn, most = (plan.protected, plan.sample_rate, plan.batches_per_pass), plan.max_batch_size
            logical = SecurePoissonSampler(*drawn, most=most) if plan.secure else PoissonSampler(*drawn, generator, most=most)
        self.sample_rate = plan.sample_rate
        self._meter = meter
        self._before_batch = before_batch
        self._place = place
        self._pass: Pass | None = None
        self._closed = False
        # accelerator.prepare(loader) would build another loader from the parts of this one, past everything that is done here.
        self._is_accelerate_prepared = True
        self._split = split
        kept = {name: getattr(loader, name) for name in _KEPT}
        if shared is not None:
            logical = PartOfEach(logical, shared)
            if kept["generator"] is not None:  # a pass draws a seed from it, too
                kept["generator"] = shared.generator
        made: type[PhysicalSampler] = PhysicalSampler
        if plan.units is not None:
            logical, made = UnitSampler(plan.units, cast(PoissonSampler, logical)), UnitPhysicalSampler
        expected, limit = plan.expected_batch_size, lambda: meter.batches_left
        super().__init__(
            loader.dataset,
            batch_sampler=made(logical, expected, max_physical_batch_size, limit, self._lend),
            collate_fn=EmptyAwareCollate(loader.collate_fn, loader.dataset, split.made),
            **kept,
        )

    def __iter__(self) -> Any:
        """Begin a pass: yields batches, in the structure of the original loader's.

        Raises:
            ScopeError: the scope is over; also from a pass that began within it.
        """
        self._check_begin()
        sampler = cast(PhysicalSampler, self.batch_sampler)
        sampler.is_own = True
        try:
            batches = super().__iter__()
        finally:
            sampler.is_own = False
        return self._batches(batches, sampler.present)

    def close(self) -> None:
        """Refuse every further batch, and stop persistent workers, which would otherwise outlive the scope."""
        self._closed = True
        workers, self._iterator = self._iterator, None
        if workers is not None and hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()

    def _check_open(self) -> None:
        if self._closed:
            raise ScopeError(
                "the private loader was used after the end of its scope. Iterate it inside the with block; to go on "
                "without privacy, use the original loader."
            )

    def _check_begin(self) -> None:
        self._check_open()
        if self._meter.remaining == 0:
            warnings.warn("the privacy budget is used up: the loader yields no more batches", stacklevel=3)

    def _lend(self, own: Pass, draws: Iterator[list[int]]) -> Iterator[list[int]]:
        self._check_begin()
        return self._split.lent(own, draws, self._hand_out)

    def _batches(self, batches: Iterator[Any], own: Pass) -> Iterator[Any]:
        for batch in batches:
            self._check_pass(own)
            placed = batch if self._place is None else self._place(batch)
            self._before_batch(own.parts.popleft(), placed)
            yield placed

    def _hand_out(self, own: Pass, part: PhysicalBatch, batch: Any) -> None:
        self._check_pass(own)
        self._before_batch(part, batch)

    def _check_pass(self, own: Pass) -> None:
        self._check_open()
        if not own.has_begun:
            self._meter.start_pass()
            own.has_begun, self._pass = True, own
        if self._pass is not own and self._meter.per_pass:
            raise ScopeError(
                "two passes over the private loader are interleaved; without Poisson sampling a pass is charged at its "
                "start, with the noise of that moment. Finish or leave one pass before beginning the next."
            )
