"""ClippedSums: takes the place of the noise, and sees what the noise would be added to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor


@dataclass
class Release:
    """What one step asks noise for: sums, each with the standard deviation of the noise on it."""

    number: int
    sums: list[tuple[list[Tensor], float]]

    def plus(self, other: "Release") -> "Release":
        """The sums of both, number by number."""
        none: tuple[list[Tensor], float] = ([], 0.0)
        both = []
        for (mine, one), (theirs, two) in zip_longest(self.sums, other.sums, fillvalue=none):
            both.append(([_sum(a, b) for a, b in zip_longest(mine, theirs)], max(one, two)))
        return Release(self.number, both)

    def apart(self, other: "Release") -> float:
        """How far another release is from this one, in standard deviations of the noise on the other, all sums together."""
        total = 0.0
        for (mine, _), (theirs, std) in zip_longest(self.sums, other.sums, fillvalue=([], 0.0)):
            square = sum(_square_distance(a, b) for a, b in zip_longest(mine, theirs))
            total += square / std**2 if std > 0 else (math.inf if square > 0 else 0.0)
        return math.sqrt(total)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor:
    if one is None or other is None:
        there = other if one is None else one
        assert there is not None  # of the longer list
        return there
    return one + other


def _square_distance(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        there = other if one is None else one
        return 0.0 if there is None else float(there.abs().double().square().sum())
    wide = torch.complex128 if one.is_complex() else torch.float64
    return float((one.to(wide) - other.to(wide)).abs().square().sum())


class ClippedSums:
    """Noise that is none: keeps the sums of the step that is taken, and lets nothing but zeros out."""

    random_numbers = "none: nothing is released"
    is_secure = is_repeatable = False

    def __init__(self, number: Callable[[], int], finished: Callable[[Release], None]) -> None:
        """``number`` tells that of the present logical batch; ``finished`` gets each release once it is complete."""
        self._number = number
        self._finished = finished
        self._present: Release | None = None

    def check_devices(self, devices: set[torch.device]) -> None:
        """All will do."""

    def add_(self, totals: Sequence[Tensor], std: float, scale: float = 1.0, *, sensitivity: float) -> bool:
        """Keep ``totals``, and put zeros in their place."""
        number = self._number()
        if self._present is None or self._present.number != number:
            self.finish()
            self._present = Release(number, [])
        self._present.sums.append(([total.detach().clone() for total in totals], std))
        for total in totals:
            total.zero_()
        return True

    def finish(self) -> None:
        """No more sums come."""
        present, self._present = self._present, None
        if present is not None:
            self._finished(present)
