"""The privacy loss of one pass in which every example is in one batch, a random one: random allocation."""

import functools
import math
from dataclasses import dataclass

import numpy as np

from .privacy_loss import Array, OnGrid, PrivacyLoss, split

# Spacing of the logarithms of what is averaged, over 1 / sigma: of one batch; at most; and how it grows with the distance from 0,
# from a share of the standard deviation on.
_OF_ONE, _WIDEST, _GROWS, _OF_DEVIATION = 0.02, 0.02, 0.01, 1 / 40
_ROWS = 256  # that are worked on at a time
_ROUNDING = 1e-12  # relative, of a mean of likelihood ratios: above what all sums and products of it have rounded off


class AllocationLoss:
    """The loss ``log(p(x) / p'(x))`` of a pass over t batches with noise sigma, of which one has the example.

    One of the two densities is the mixture ``(1/t) sum_j N(e_j, sigma^2 I)`` over t unit vectors, the other ``N(0, sigma^2 I)``.
    They are a dominating pair, in each direction, for a pass in which the others are allocated independently and a null record
    stands in the place of the example: given the allocation of the others, the two runs differ by the example's gradient alone;
    the likelihood ratio is the mean over j of ``exp((x_j - 1/2) / sigma^2)``, x_j the part of what batch j releases that lies
    in the direction of that gradient, less what the others add; without the example the x_j are independent normal numbers, even
    if each gradient is chosen by what was released before; and a gradient shorter than 1 is what noise makes of one of length 1.
    (Chua et al., 2024, arXiv:2412.16802; Feldman and Shenfeld, 2025, arXiv:2502.08202 and 2602.17284, who also show that the loss
    of the whole pass can be had by convolution. The way taken here is another one.)

    Both divergences are means, without the example, of convex functions of that ratio R: ``H_alpha = E[(R - alpha)+]``, and
    ``E[(1 - alpha R)+]`` the other way round. They can only grow if a term of R, or a mean of some of its terms, is replaced by two
    numbers around it with the same mean. So the distribution of R is worked out on grids that are fine where it matters, every
    number being split between its neighbours, by doubling the number of terms: an upper bound for every alpha, in both
    directions, and so for every composition.

    Args:
        sigma: noise multiplier, greater than 0.
        batches: t.
        removed: whether p is the mixture; else p' is.
        outside: the probability that may be left out; it counts as loss without bound.
    """

    def __init__(self, sigma: float, batches: int, *, removed: bool, outside: float) -> None:
        """Work the distribution out."""
        self.outside = 2.0 ** (8 * math.floor(math.log2(outside) / 8))  # the same for most numbers of passes
        ratio, mass = _mean_ratio(sigma, batches, self.outside)
        logarithm = np.log(ratio)
        self._loss: Array = logarithm + _ROUNDING if removed else _ROUNDING - logarithm[::-1]
        self._mass: Array = mass * ratio if removed else mass[::-1]

    @property
    def largest(self) -> float:
        """The largest loss but for what is left out."""
        return float(self._loss[-1])

    def nodes(self) -> tuple[Array, Array]:
        """Return losses in ascending order, and the logarithms of their probabilities."""
        with np.errstate(divide="ignore"):
            logarithms: Array = np.log(self._mass)
        return self._loss, logarithms

    def on_grid(self, spacing: float, least: float = -math.inf) -> OnGrid:
        """Return a distribution of losses on multiples of ``spacing`` that dominates this one; those below ``least`` are raised."""
        lowest = math.floor(max(float(self._loss[0]), least) / spacing)
        place = np.maximum(self._loss / spacing, lowest)
        cell = np.floor(place)
        up: Array = np.expm1(-spacing * (place - cell)) / math.expm1(-spacing)
        index = (cell - lowest).astype(np.int64)
        size = int(index[-1]) + 2
        return OnGrid(lowest, split(index, self._mass, self._mass * up, size), spacing)


class _Grid:
    """Positive numbers in ascending order, close to each other near 1, and where a number is among them."""

    def __init__(self, lowest: float, highest: float, finest: float, widest: float) -> None:
        """From one logarithm to another, ``finest`` apart at 0, and never more than ``widest``."""
        self._finest, self._widest = min(finest, widest), widest
        self._turn = math.sqrt(max(0.0, widest**2 - self._finest**2)) / _GROWS  # from here on they are equally spaced
        self._at_turn = math.asinh(_GROWS * self._turn / self._finest) / _GROWS
        self._first = math.floor(float(self._place(np.array([lowest]))[0]))
        last = math.ceil(float(self._place(np.array([highest]))[0])) + 1
        place = np.arange(self._first, last + 1, dtype=np.float64)
        inner = np.minimum(np.abs(place), self._at_turn)
        logarithm = self._finest / _GROWS * np.sinh(_GROWS * inner) + self._widest * (np.abs(place) - inner)
        self.values: Array = np.exp(np.sign(place) * logarithm)

    def _place(self, logarithm: Array) -> Array:
        size = np.abs(logarithm)
        inner = np.minimum(size, self._turn)
        return np.sign(logarithm) * (np.arcsinh(_GROWS / self._finest * inner) / _GROWS + (size - inner) / self._widest)

    def split(self, numbers: Array, mass: Array) -> Array:
        """Return the mass of each value when every one of the ``numbers`` is split between its neighbours, keeping its mean."""
        cell = np.floor(self._place(np.log(numbers))).astype(np.int64) - self._first
        cell = np.clip(cell, 0, len(self.values) - 2)
        low = self.values[cell]
        up: Array = mass * np.clip((numbers - low) / (self.values[cell + 1] - low), 0.0, 1.0)
        return split(cell, mass, up, len(self.values))


@functools.lru_cache(maxsize=64)
def _mean_ratio(sigma: float, batches: int, outside: float) -> tuple[Array, Array]:
    """Return values of R, ascending, and their probabilities without the example; at most ``outside`` is missing either way."""
    one = PrivacyLoss(sigma, 1.0, removed=True, outside=outside / 2 / batches).on_grid(_OF_ONE / sigma)
    ratio = np.exp(one.spacing * np.arange(one.first, one.first + len(one.mass)))
    single = Mean(ratio, one.mass / ratio, 1)
    mean, share = single, outside / 2 / (2 * batches.bit_length())
    for bit in bin(batches)[3:]:
        mean = mean.with_more(mean, sigma).trimmed(share / batches)
        if bit == "1":
            mean = mean.with_more(single, sigma).trimmed(share / batches)
    return mean.values, mean.mass


@dataclass(frozen=True)
class Mean:
    """The distribution of the mean of ``count`` likelihood ratios: values, ascending, and their probabilities."""

    values: Array
    mass: Array
    count: int

    def with_more(self, other: "Mean", sigma: float) -> "Mean":
        """Return that of the ratios of both together."""
        count = self.count + other.count
        deviation = math.sqrt(math.expm1(min(1 / sigma**2, 700.0)) / count)
        mine, others = self.values * (self.count / count), other.values * (other.count / count)
        ends = math.log(mine[0] + others[0]), math.log(mine[-1] + others[-1])
        grid = _Grid(*ends, deviation * _OF_DEVIATION, _WIDEST / sigma)
        mass = np.zeros(len(grid.values))
        for rows in range(0, len(mine), _ROWS):
            some = slice(rows, rows + _ROWS)
            numbers = mine[some, None] + others[None, :]
            mass += grid.split(numbers.ravel(), (self.mass[some, None] * other.mass[None, :]).ravel())
        return Mean(grid.values, mass, count)

    def trimmed(self, share: float) -> "Mean":
        """Return it without the values at both ends that have at most this ``share`` for each ratio, either way."""
        weight = self.mass * (1 + self.values)
        allowed = share * self.count / 2
        first = int(np.searchsorted(np.cumsum(weight), allowed, side="right"))
        last = len(weight) - int(np.searchsorted(np.cumsum(weight[::-1]), allowed, side="right"))
        return Mean(self.values[first:last], self.mass[first:last], self.count)
