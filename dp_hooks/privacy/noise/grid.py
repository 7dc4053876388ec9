"""The grid that sums and noise are on, and what rounding to it costs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._validate import bad
from .rounded_gaussian import MOST_UNITS

_COST = 1 << 12  # of the sensitivity, rounding may add one part in so many
_FINE, _FINEST = 1 << 20, 1 << 29  # grid points in a standard deviation, at least and about at most
_FAR = 2.0**61  # sums are cut off at so many grid points, far from where int64 ends


@dataclass(frozen=True)
class Grid:
    """Multiples of a power of two, chosen from public numbers, with noise of a whole number of them.

    Sensitivity on the grid: rounding to the nearest multiple of g moves a coordinate by at most g / 2, so two neighbouring sums of
    ``d`` numbers, whose difference has Euclidean norm at most S, have after rounding, by the triangle inequality, a difference
    of at most::

        S + g sqrt(d)

    (one coordinate: ``|round(a) - round(b)| <= |a - b| + g``, and it can be that much: both may lie next to the middle between two
    points). The noise is larger in proportion: ``units * g >= std (S + g sqrt(d)) / S``, so that what is
    charged for ``std / S`` pays for the rounding, too. g is so small that this is at most one part in 4096, unless
    ``sqrt(d) std / S`` is above 2^17.

    Attributes:
        spacing: g.
        units: the standard deviation of the noise in multiples of g.
    """

    spacing: float
    units: int

    @classmethod
    def of(cls, std: float, sensitivity: float, numbers: int) -> "Grid":
        """Choose the grid for noise of ``std`` on ``numbers`` numbers that change by at most ``sensitivity`` together.

        Raises:
            InvalidArgumentError: there is no such grid, since ``std`` is out of all proportion.
        """
        root = math.sqrt(numbers)
        wanted = max(min(std / _FINE, sensitivity / (_COST * root)), std / _FINEST)
        spacing = math.ldexp(1.0, math.frexp(wanted)[1] - 1) if wanted > 2.0**-1000 else 0.0  # rounded down
        units = math.inf if spacing == 0 else std / sensitivity * (sensitivity / spacing + root)
        if not units < MOST_UNITS - 2:
            remedy = f"secure_mode=True has no grid for noise of so many sensitivities (or so few) on {numbers} numbers."
            raise bad("noise_multiplier", std / sensitivity, remedy)
        return cls(spacing, math.ceil(units) + 1)  # 1: whatever the divisions were rounded by

    def points(self, numbers: Tensor) -> Tensor:
        """Round float64 ``numbers`` to the grid: int64, how many ``spacing`` s each is from 0.

        To divide by a power of two is exact. Numbers further out than 2^61 points are moved there, which brings no two of them
        further apart; a NaN becomes any number.
        """
        return (numbers / self.spacing).round_().clamp_(-_FAR, _FAR).to(torch.int64)
