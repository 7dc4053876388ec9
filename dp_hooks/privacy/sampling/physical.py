"""Physical batches: the parts of logical batches that fit into memory."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, Sampler

from ...errors import ScopeError


@dataclass(frozen=True)
class PhysicalBatch:
    """What the loader knows of a batch it hands out.

    Attributes:
        logical: running number of the logical batch it belongs to.
        index: position among the physical parts of that logical batch.
        size: number of examples in it; 0 if Poisson sampling drew none.
        last: whether it completes the logical batch.
        units: where units are protected, how many examples each unit in it has, in the order of the examples; else None.
    """

    logical: int
    index: int
    size: int
    last: bool
    units: tuple[int, ...] | None = None


@dataclass(eq=False)
class Pass:
    """One pass over the batches of a loader: what was drawn and not handed out yet, and whether a part was handed out."""

    parts: deque[PhysicalBatch] = field(default_factory=deque)
    has_begun: bool = False


class OncePerPass(Sampler[list[int]]):
    """Hands on the batches of an ordinary sampler and stops at the first example that appears twice in a pass."""

    def __init__(self, batches: BatchSampler) -> None:
        """Guard ``batches``."""
        self.batches = batches

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.batches)

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


class SharedDraws(Protocol):
    """How several processes draw the same batches, and share each.

    Attributes:
        generator: what they are drawn by.
    """

    generator: torch.Generator

    def begin_pass(self) -> None:
        """A pass begins, here as in all other processes: bring the generators into the same state again."""

    def part(self, indices: list[int]) -> list[int]:
        """What this process has of a batch with these examples."""
        ...


class PartOfEach(Sampler[list[int]]):
    """What one of several processes has of every logical batch, which all of them draw alike."""

    def __init__(self, batches: Any, draws: SharedDraws) -> None:
        """``batches`` are drawn by the generator of ``draws``."""
        self.batches = batches
        self._draws = draws

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over one pass.

        A pass that was left early may have been drawn ahead for the workers of a loader, by each process as far as it had parts.
        """
        self._draws.begin_pass()
        return map(self._draws.part, self.batches)


class LogicalBatches(Protocol):
    """What draws logical batches, each in whatever form, so many a pass."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class PhysicalSampler(BatchSampler):
    """Splits logical batches into physical ones and keeps, per pass, a queue that says which part is which.

    Loader workers fetch ahead of the training loop, so the queue is filled when indices are drawn and read when batches
    arrive; DataLoader returns them in the order of drawing.
    """

    def __init__(
        self,
        logical: LogicalBatches,
        expected: float,
        max_size: int | None,
        limit: Callable[[], int | None],
        lend: Callable[[Pass, Iterator[list[int]]], Iterator[list[int]]],
    ) -> None:
        """Split the batches of ``logical`` (``expected`` examples each) into parts of at most ``max_size``.

        ``limit`` says at the start of a pass how many batches it may have; other loaders get what ``lend`` makes of a pass.
        """
        self.logical = logical
        self.max_size = max_size
        self.limit = limit
        self.is_own = False  # whether a pass that begins now is of the loader that has this sampler, or of another one
        self.present = Pass()  # that began last
        self.batch_size = max(1, round(min(expected, max_size or expected)))  # for the length of Opacus's BatchSplittingSampler
        self._lend = lend
        self._drawn = 0
        self._per_batch = 1 if max_size is None else max(1, math.ceil(expected / max_size))

    def __len__(self) -> int:
        """Expected number of parts in a pass (exact if there are no physical batches and no budget ends it)."""
        return len(self.logical) * self._per_batch

    def __iter__(self) -> Iterator[list[int]]:
        """Begin a pass with a queue of its own."""
        self.present = Pass()
        parts = self._parts(self.present.parts, self.limit())
        return parts if self.is_own else self._lend(self.present, parts)

    def _parts(self, queue: deque[PhysicalBatch], limit: int | None) -> Iterator[list[int]]:
        if limit == 0:
            return
        for count, indices in enumerate(self.logical, start=1):
            self._drawn += 1
            number, step = self._drawn, self.max_size or max(1, len(indices))
            chunks = [indices[i : i + step] for i in range(0, len(indices), step)] or [[]]
            for index, chunk in enumerate(chunks):
                queue.append(PhysicalBatch(number, index, len(chunk), index == len(chunks) - 1))
                yield chunk
            if limit is not None and count >= limit:
                return
