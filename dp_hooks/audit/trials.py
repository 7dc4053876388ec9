"""Trials: batches that differ in one example, in the place of those that are drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset


@dataclass(frozen=True)
class Trial:
    """A batch to be tried: the examples of it, in their order; of which batch, at how many times the bound, and what was done to
    it.

    ``kind`` is "whole", with which the trials after it, up to the next such, are compared; or "reversed", "half" (of which there
    are two), "without" or "again".
    """

    kind: str
    indices: tuple[int, ...]
    batch: int
    times: float
    left_out: int = -1


# Of the bound: as it is given, so small that every gradient is clipped, and so large that none is.
BOUNDS = (1.0, 1e-3, 1e3)


def trials_of(batches: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]) -> list[Trial]:
    """Return the trials of ``batches``: whole, reversed, in halves, without each of those ``chosen``, and once more.

    All at each of the :data:`BOUNDS`; at the largest, where clipping hides nothing that examples do to each other, without a few
    only.
    """
    found = []
    for number, (batch, without) in enumerate(zip(batches, chosen, strict=True)):
        for times in BOUNDS:
            found.append(Trial("whole", tuple(batch), number, times))
            found.append(Trial("reversed", tuple(reversed(batch)), number, times))
            found += [Trial("half", tuple(batch[k::2]), number, times) for k in (0, 1)]
            for i in without if times <= 1 else without[:2]:
                found.append(Trial("without", tuple(k for k in batch if k != i), number, times, i))
            found.append(Trial("again", tuple(batch), number, times))
    return found


class Over(BaseException):
    """All trials were made: the loop that goes on asking for batches is left."""


class TrialSampler:
    """Hands out the trials one after the other, over as many passes as it takes."""

    def __init__(self, trials: Sequence[Trial], begin: Callable[[Trial], None]) -> None:
        """``begin`` is called with each before it is handed out."""
        self._trials = trials
        self._begin = begin
        self.handed_out = 0

    def __len__(self) -> int:
        """Trials that are left."""
        return len(self._trials) - self.handed_out

    def __iter__(self) -> Iterator[list[int]]:
        """Go on where the pass before stopped.

        Raises:
            Over: none is left.
        """
        if not len(self):
            raise Over
        while len(self):
            trial = self._trials[self.handed_out]
            self.handed_out += 1
            self._begin(trial)
            yield list(trial.indices)

    def trial(self, number: int) -> Trial:
        """Return the one that was handed out as logical batch ``number``, counted from 1."""
        return self._trials[number - 1]


class FixedItems(Dataset[Any]):
    """A dataset whose examples are what they were when first asked for: augmentation would change them between two trials."""

    def __init__(self, dataset: Any) -> None:
        """Of ``dataset``, which has a length."""
        self._dataset = dataset
        self._items: dict[int, Any] = {}

    def __len__(self) -> int:
        """Examples in it."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        """Return the example."""
        if index not in self._items:
            several = getattr(self._dataset, "__getitems__", None)  # as a DataLoader asks for them
            self._items[index] = self._dataset[index] if several is None else several([index])[0]
        return self._items[index]
