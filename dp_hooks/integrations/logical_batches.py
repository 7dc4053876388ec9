"""A private loader as a trainer sees it: one item is one logical batch, whatever parts it comes in."""

from collections.abc import Callable, Iterator
from typing import Any

from ..errors import ScopeError
from ..privacy.sampling.loader import PrivateDataLoader
from ..training.optimizer import PrivateOptimizer


class LogicalBatch:
    """The physical parts of one logical batch, each fetched when the one before it was used."""

    def __init__(self, first: Any, further: Iterator[Any], optimizer: PrivateOptimizer) -> None:
        """``first`` was handed out just now; the rest of it will come from ``further``."""
        self._first: list[Any] = [first]
        self._further = further
        self._optimizer = optimizer

    def parts(self) -> Iterator[tuple[Any, int]]:
        """Yield each part, once, with the number of examples in it."""
        if not self._first:
            raise ScopeError("a batch of the private loader was used twice by the trainer: its sampling was charged once.")
        part = self._first.pop()
        while True:
            known = self._optimizer.physical_batch
            assert known is not None  # the loader has handed it out
            yield part, known.size
            if known.last:
                return
            part = next(self._further)

    def __contains__(self, key: object) -> bool:
        """No: a trainer that looks for a field here looks too early."""
        return False

    def __getitem__(self, key: Any) -> Any:
        """Refused: there is no field of a whole logical batch."""
        raise ScopeError(
            f"[{key!r}]: a logical batch has no fields, its physical parts have; they come to training_step() one by one."
        )


class LogicalBatches:
    """Stands where a trainer has its loader: as long as a pass has logical batches, each of them one item.

    Attributes:
        dataset: what the batches are drawn from.
        batch_size: None: it differs from batch to batch.
    """

    batch_size = None

    def __init__(
        self,
        loader: PrivateDataLoader,
        optimizer: PrivateOptimizer,
        batches_per_pass: int,
        at_the_end: Callable[[], None] | None = None,
    ) -> None:
        """Go through ``loader``; ``at_the_end`` is called when a pass has no batch, since the budget is used up."""
        self._at_the_end = at_the_end
        self._loader = loader
        self._optimizer = optimizer
        self._length = batches_per_pass
        self.dataset = loader.dataset

    def __len__(self) -> int:
        """Logical batches in a pass."""
        return self._length

    def __iter__(self) -> Iterator[LogicalBatch]:
        """Begin a pass."""
        parts, began = iter(self._loader), False
        for first in parts:
            began = True
            yield LogicalBatch(first, parts, self._optimizer)
        if not began and self._at_the_end is not None:
            self._at_the_end()
