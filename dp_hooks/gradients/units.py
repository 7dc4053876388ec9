"""Units: which rows of a batch belong to one protected unit (a user, a patient), where that is more than one example."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..rules.outer import scatter_rows


class Units:
    """The units of a batch of rows; each has one row or more.

    Attributes:
        of_rows: ``[n]``, the number of the unit of each row: whole numbers from 0 on, on the CPU.
        count: how many units there are.
    """

    def __init__(self, of_rows: Tensor | Sequence[int]) -> None:
        """Each row belongs to the unit that ``of_rows`` ``[n]`` names, by any whole number."""
        labels = torch.as_tensor(of_rows, dtype=torch.long, device="cpu")
        kinds, self.of_rows, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
        self.count = len(kinds)
        self._sizes: Tensor = sizes
        self._on: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.of_rows)

    @property
    def are_single(self) -> bool:
        """Whether every unit has one row, in the order of the rows: units are rows then."""
        return self.count == len(self)

    def on(self, device: torch.device) -> Tensor:
        """``of_rows`` on a device."""
        if device not in self._on:
            self._on[device] = self.of_rows.to(device)
        return self._on[device]

    def rows_of(self, unit: int) -> Tensor:
        """The numbers of the rows of one unit."""
        rows: Tensor = (self.of_rows == unit).nonzero().flatten()
        return rows

    def among(self, rows: Tensor) -> "Units":
        """The units of some of the rows."""
        return Units(self.of_rows[rows])

    def spread(self, values: Tensor) -> Tensor:
        """Return ``[n]``: of each row the value of its unit, of ``values`` ``[count]``."""
        spread: Tensor = values[self.on(values.device)]
        return spread

    def added(self, rows: Tensor) -> Tensor:
        """Return ``[count, ...]``: the sums over the rows of each unit, of ``rows`` ``[n, ...]``."""
        if not rows.numel():
            return rows.new_zeros(self.count, *rows.shape[1:])
        total = scatter_rows(self.on(rows.device), rows.reshape(len(rows), -1), self.count)
        return total.view(self.count, *rows.shape[1:])

    @cached_property
    def alike(self) -> "list[UnitsAlike]":
        """Units with about as many rows, together: what is worked out for them has one shape, and little of it is padding."""
        order, ends = self.of_rows.argsort(stable=True), self._sizes.cumsum(0)
        padded = torch.tensor([_step_above(size) for size in self._sizes.tolist()], dtype=torch.long, device="cpu")
        found = []
        for size in sorted(set(padded.tolist())):
            units = (padded == size).nonzero().flatten()
            own, places = self._sizes[units, None], torch.arange(size, device="cpu")
            rows = order[(ends[units, None] - own) + places.clamp(max=size - 1).minimum(own - 1)]
            found.append(UnitsAlike(units, rows, places >= own))
        return found


class UnitsAlike:
    """Some units of a batch, all taken to have ``size`` rows: of a unit with fewer the last one stands in places left blank.

    Attributes:
        units: ``[k]``, which units they are.
        rows: ``[k, size]``, the numbers of their rows.
        blank: ``[k, size]``, the places to be left out; None: there are none.
    """

    def __init__(self, units: Tensor, rows: Tensor, blank: Tensor | None) -> None:
        """Of ``units`` with these ``rows``, on the CPU."""
        self.units, self.rows = units, rows
        self.blank = blank if blank is not None and bool(blank.any()) else None
        self._first: int | None = None  # the first row, if they follow each other in the batch
        if self.blank is None and rows.numel():
            first = int(rows[0, 0])
            follow = torch.arange(first, first + rows.numel(), device="cpu")
            self._first = first if torch.equal(rows.flatten(), follow) else None
        self._on: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def __len__(self) -> int:
        """How many units there are."""
        return len(self.units)

    @property
    def size(self) -> int:
        """How many rows each is taken to have."""
        return int(self.rows.shape[1])

    def part(self, chosen: slice | Tensor) -> "UnitsAlike":
        """Some of them."""
        if isinstance(chosen, slice) and chosen.indices(len(self)) == (0, len(self), 1):
            return self
        chosen = chosen if isinstance(chosen, slice) else chosen.cpu()
        return UnitsAlike(self.units[chosen], self.rows[chosen], None if self.blank is None else self.blank[chosen])

    def column(self, place: int) -> "UnitsAlike":
        """The same units with one of their rows each."""
        only = slice(place, place + 1)
        return UnitsAlike(self.units, self.rows[:, only], None if self.blank is None else self.blank[:, only])

    def numbers(self, device: torch.device) -> slice | Tensor:
        """The numbers of all rows, ``[k * size]``; a slice where they follow each other."""
        if self._first is not None:
            return slice(self._first, self._first + self.rows.numel())
        return self._there(device)[0].flatten()

    def weights(self, weights: Tensor | None, device: torch.device) -> Tensor | None:
        """Return, for the rows :meth:`numbers` names, the weight of each, of ``weights`` ``[n]``, and 0 in places left blank.

        None: all are 1. (What is not finite stays so in a place left blank: its unit has the same row in another place.)
        """
        blank = self._there(device)[1]
        here = None if weights is None else weights.to(device)[self.numbers(device)]
        if blank is None:
            return here
        counted = ~blank.flatten()
        return counted.float() if here is None else here * counted

    def put_together(self, picked: Tensor, weights: Tensor | None) -> Tensor:
        """Return ``[k, size, ...]`` of ``picked`` ``[k * size, ...]``, what is of the rows :meth:`numbers` names, weighed."""
        here = self.weights(weights, picked.device)
        if here is not None:
            picked = picked * here.to(picked).view(-1, *[1] * (picked.dim() - 1))
        together: Tensor = picked.unflatten(0, self.rows.shape)
        return together

    def _there(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in self._on:
            self._on[device] = self.rows.to(device), None if self.blank is None else self.blank.to(device)
        return self._on[device]


def _step_above(size: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is no less: few kinds of sizes, and at most half more than there is."""
    power = 1 << (size - 1).bit_length()
    return 3 * power // 4 if power >= 4 and size <= 3 * power // 4 else power
