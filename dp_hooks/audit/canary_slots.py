"""CanarySlots: examples whose places in the batches canaries take."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class CanarySlots:
    """Stands in front of the sampler of logical batches, and keeps some examples out of them.

    When one of these is drawn, its canary is in that batch, if its coin fell so, and nothing is otherwise: a null record. So
    canaries are drawn by the very sampler of the run, at the rate that it has.
    """

    def __init__(self, slots: Tensor, examples: int) -> None:
        """``slots`` are the numbers of the examples, ``[m]``, out of so many ``examples``."""
        self._sampler: Any = ()
        self._canary_of = torch.full((examples,), -1, dtype=torch.long, device="cpu")
        self._canary_of[slots] = torch.arange(len(slots), device="cpu")
        self._drawn: list[Tensor] = []

    def stand_before(self, sampler: Any) -> None:
        """Hand on what ``sampler`` draws."""
        self._sampler = sampler

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        """Draw the batches of one pass."""
        for indices in self._sampler:
            batch = torch.tensor(indices, dtype=torch.long, device="cpu")
            canaries = self._canary_of[batch]
            self._drawn.append(canaries[canaries >= 0])
            yield batch[canaries < 0].tolist()

    def drawn(self, number: int) -> Tensor:
        """Return which canaries' places were drawn into logical batch ``number``, counted from 1; as often as they were."""
        return self._drawn[number - 1]
