"""The privacy loss of one release, and its distribution on a grid that is never less revealing."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Gauss-Legendre with 5 points, on pieces this many times shorter than the scale on which the integrands change: an error near
# that of rounding.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(5)
_PIECES_PER_SCALE = 32
_ROUNDING = 4 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class OnGrid:
    """A distribution of losses ``(first + k) * spacing`` with probabilities ``mass[k]``; the rest are losses without bound."""

    first: int
    mass: Array
    spacing: float

    def log_moment(self, t: float) -> float:
        """Return ``log E[e^(t loss)]`` over the finite losses."""
        return _log_sum(self.log_tilted(t))

    def log_tilted(self, t: float) -> Array:
        """Return ``log(mass * e^(t loss))``."""
        with np.errstate(divide="ignore"):
            logarithms: Array = np.log(self.mass) + t * self.spacing * np.arange(self.first, self.first + len(self.mass))
        return logarithms


class Loss(Protocol):
    """What a composition has to know of the privacy loss of one release."""

    @property
    def outside(self) -> float:
        """The probability that counts as loss without bound."""

    @property
    def largest(self) -> float:
        """The largest loss but for what is left out."""

    def nodes(self) -> tuple[Array, Array]:
        """Return losses in ascending order, and the logarithms of their probabilities, to estimate integrals by."""

    def on_grid(self, spacing: float, least: float = -math.inf) -> OnGrid:
        """Return a distribution of losses on multiples of ``spacing`` that dominates this one; those below ``least`` are raised."""


class PrivacyLoss:
    """The loss ``log(p(x) / p'(x))``, x drawn from p, of one Poisson-sampled Gaussian release of sensitivity 1.

    Of the two densities one is the mixture ``(1 - q) N(0, sigma^2) + q N(1, sigma^2)``, with the example in the data, the other
    ``N(0, sigma^2)``, with a null record in its place. They are a dominating pair for that relation, in each direction (Zhu,
    Dong and Wang, AISTATS 2022, arXiv:2106.08567, on Poisson sampling). ``removed`` says that p is the mixture; else p' is.

    Args:
        sigma: noise multiplier, greater than 0.
        rate: q in (0, 1].
        removed: the direction.
        outside: the probability of x that may be left out; it counts as loss without bound.
        side: 1: only the losses above 0, -1: only those below it; 0: all. A part of the distribution, then.
    """

    def __init__(self, sigma: float, rate: float, *, removed: bool, outside: float, side: int = 0) -> None:
        """Lay the pieces that integrals over x are taken on; x has the unit of the sensitivity."""
        self.sigma, self.rate, self.removed, self.outside, self._side = sigma, rate, removed, outside, side
        reach = sigma * math.sqrt(-2 * math.log(outside))  # P(|N(0, 1)| > r) <= exp(-r^2 / 2)
        self._low, self._high = -reach, reach + (1.0 if removed else 0.0)
        # The Gaussian changes over sigma; the loss has its singularities at the imaginary distance pi sigma^2.
        pieces = math.ceil((self._high - self._low) / min(sigma, 3 * sigma**2) * _PIECES_PER_SCALE)
        self._pieces: Array = np.linspace(self._low, self._high, pieces + 1)
        if side:
            self._pieces = np.unique(np.append(self._pieces, 0.5))  # where the loss is 0

    @property
    def largest(self) -> float:
        """The largest loss but for what is left out."""
        return float(self._loss(np.array([self._high if self.removed else self._low]))[0])

    def nodes(self) -> tuple[Array, Array]:
        """Return losses in ascending order, and the logarithms of their probabilities, to estimate integrals by."""
        _, x, weights = _nodes_between(self._pieces)
        loss = self._loss(x)
        order = 1 if self.removed else -1
        loss, log_probability = loss.ravel()[::order], (self._log_density(x, loss) + np.log(weights)).ravel()[::order]
        there = self._is_there(loss)
        return loss[there], log_probability[there]

    def on_grid(self, spacing: float, least: float = -math.inf) -> OnGrid:
        """Return a distribution of losses on multiples of ``spacing`` that dominates this one; those below ``least`` are raised.

        Connect the dots (Doroshenko et al., PETS 2022, arXiv:2207.04380): the probability of each cell of the grid, under p and
        under p', is kept, all of it at the two ends of the cell. So delta is exact at the grid's epsilons and too large
        between. Integrated as a share of positive numbers, cell by cell, nothing cancels.
        """
        if self._side:
            least = min(least, 0.0)  # 0 is an end of a cell
        ends = sorted(self._loss(np.array([self._low, self._high])))
        lowest = math.floor(max(ends[0], least) / spacing)
        cuts = self._where(spacing * np.arange(lowest, math.floor(ends[1] / spacing) + 1))
        edges = np.sort(np.concatenate([self._pieces, np.clip(cuts, self._low, self._high)]), kind="stable")
        middle, x, weights = _nodes_between(edges)
        loss = self._loss(x)
        probability = np.exp(self._log_density(x, loss)) * weights * self._is_there(self._loss(middle))
        place = np.maximum(loss / spacing, lowest)
        cell = np.floor(np.maximum(self._loss(middle) / spacing, lowest))
        share = np.clip(place - cell + _ROUNDING * (np.abs(cell) + 1), 0.0, 1.0)  # of the way to the upper end, rounded up
        up = np.expm1(-spacing * share) / math.expm1(-spacing)
        first = int(cell.min())
        index = (cell[:, 0] - first).astype(np.int64)
        size = int(index.max()) + 2
        return OnGrid(first, split(index, probability.sum(1), (probability * up).sum(1), size), spacing)

    def _is_there(self, loss: Array) -> NDArray[np.bool_]:
        return loss * self._side > 0 if self._side else np.full(loss.shape, True)

    def _loss(self, x: Array) -> Array:
        loss = self._mixture_over_gaussian(x)
        return loss if self.removed else -loss

    def _mixture_over_gaussian(self, x: Array) -> Array:
        """The logarithm of the ratio of the two densities, which grows with x."""
        z, q = (x - 0.5) / self.sigma**2, self.rate
        if q == 1:
            return z
        change = q * np.expm1(np.minimum(z, 500.0))
        ratio: Array = np.log1p(np.maximum(change, -0.5))
        large = np.abs(change) >= 0.5  # seldom, and a slow function
        ratio[large] = np.logaddexp(math.log1p(-q), math.log(q) + z[large])
        return ratio

    def _where(self, loss: Array) -> Array:
        """Return the x with this loss; -inf where there is none because all are larger, or smaller."""
        q, loss = self.rate, loss if self.removed else -loss
        if q == 1:
            return loss * self.sigma**2 + 0.5
        with np.errstate(divide="ignore", invalid="ignore"):
            small = np.log1p(np.maximum(np.expm1(np.minimum(loss, 500.0)) / q, -1.0))
            large = loss - math.log(q) + np.log1p(-(1 - q) * np.exp(-np.maximum(loss, 1.0)))
        return np.where(loss < 500.0, small, large) * self.sigma**2 + 0.5

    def _log_density(self, x: Array, loss: Array) -> Array:
        gaussian = -0.5 * (x / self.sigma) ** 2 - math.log(self.sigma * math.sqrt(2 * math.pi))
        return gaussian + loss if self.removed else gaussian


def split(cell: NDArray[np.int64], mass: Array, up: Array, size: int) -> Array:
    """Return the masses at ``size`` places, of which those in a cell are at its two ends: ``up`` at the upper one."""
    return np.bincount(cell, mass - up, size).astype(np.float64) + np.bincount(cell + 1, up, size)


def _nodes_between(edges: Array) -> tuple[Array, Array, Array]:
    """Return the middle of every piece ``[n, 1]``, and the nodes and weights ``[n, 5]`` of its Gauss-Legendre quadrature."""
    middle, half = ((edges[1:] + edges[:-1]) / 2)[:, None], ((edges[1:] - edges[:-1]) / 2)[:, None]
    return middle, middle + half * _NODES, half * _WEIGHTS


def _log_sum(logarithms: Array) -> float:
    largest = float(logarithms.max())
    return largest + math.log(float(np.exp(logarithms - largest).sum()))
