"""Private batches that another loader draws, cuts into parts and hands out: Opacus's ``BatchMemoryManager``."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ...errors import ScopeError
from .physical import Pass, PhysicalBatch


class Split:
    """Knows which part of which logical batch another loader, built of the private one's sampler and collate function, makes.

    Opacus's ``BatchSplittingSampler`` draws a batch from our sampler, and before it hands on the indices of a part it tells the
    optimizer whether more parts of the batch follow; the loader above it then has the part collated. Where these three calls
    come in turn and add up to the batch, the part is known. Any other order is refused before the part is handed out.
    """

    def __init__(self) -> None:
        """Nothing was drawn by another loader yet."""
        self._hand_out: Callable[[PhysicalBatch, Any], None] = lambda part, batch: None
        self._pass: Pass | None = None
        self._batch: PhysicalBatch | None = None  # drawn last by another loader
        self._left = 0  # its examples that are in no part yet
        self._parts = 0  # of its logical batch, so far
        self._more: bool | None = None  # announced of the next part: whether others follow it

    def lent(self, own: Pass, draws: Iterator[list[int]], hand_out: Callable[..., None]) -> Iterator[list[int]]:
        """Go through ``draws``, those of the pass ``own``, for another loader; each part it makes goes to ``hand_out`` first."""
        try:
            for indices in draws:
                self.check_made()
                if self._batch is not None and 0 < self._left < self._batch.size:
                    what = "two passes over the private loader are interleaved: another one is amid a batch that was cut into parts"
                    raise ScopeError(f"{what}. Finish it, or let go of its iterator, which a variable or a traceback still holds.")
                batch = own.parts.popleft()
                if self._batch is None or self._batch.logical != batch.logical:
                    self._parts = 0
                self._pass, self._batch, self._left, self._hand_out = own, batch, batch.size, partial(hand_out, own)
                yield indices
        finally:
            if self._pass is own:
                self._pass = self._batch = self._more = None

    def announce(self, more: bool) -> None:
        """A part of the batch drawn last comes next; ``more``: others follow it. A ``ScopeError`` if there is no such batch."""
        self.check_made()
        if self._batch is None or (not self._left and (self._batch.size or self._parts)):
            raise _refused("signal_skip_step() was called, but no batch of the private loader is being cut into parts")
        self._more = bool(more)

    def check_made(self) -> None:
        """Raise a ``ScopeError`` if a part was announced and not made: a step would be taken for another one."""
        if self._more is not None:
            raise _refused(
                "a part of a batch was announced (signal_skip_step), but the collate function of the private loader failed, or did "
                "not make it in this process. Loader workers fetch ahead: BatchMemoryManager needs num_workers=0"
            )

    def made(self, batch: Any, size: int) -> None:
        """``batch`` was collated of ``size`` examples: if announced it is handed out, or refused where sizes do not add up."""
        whole, more, self._more = self._batch, self._more, None
        if more is None or whole is None:
            return
        if size > self._left or more != (size < self._left):
            self._batch = None  # nothing more comes of it
            raise _refused(f"a part of {size} examples was made of a batch of {whole.size}, {self._left} of which were left")
        part = PhysicalBatch(whole.logical, self._parts, size, whole.last and not more)
        self._left, self._parts = self._left - size, self._parts + 1
        self._hand_out(part, batch)


def _refused(what: str) -> ScopeError:
    given = "BatchMemoryManager has to be given the loader and the optimizer of one private scope, and its loader to be iterated."
    return ScopeError(f"{what}. {given} Without it, max_physical_batch_size= in the scope or make_private does the same.")
