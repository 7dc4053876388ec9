"""What two neighbouring datasets spend, by hand: a lower bound of every guarantee, which shares nothing with the library."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Array = np.ndarray
Case = tuple[float, float, float]  # probability, and the mean of the noised sum with the example and with a null record
_STEP = 2e-3  # of losses, which are rounded down to multiples of it


def truncated_cases(rate: float, examples: int, most: int, other: float) -> list[Case]:
    """Truncated Poisson sampling: every other example has gradient ``other``, the one that matters has 1.

    By the number of others that were drawn, and how many of all are kept: nothing of the library's formulas is in it.
    """
    found = []
    for others in range(examples):
        p = float(stats.binom.pmf(others, examples - 1, rate))
        kept = min(others, most)
        found.append((p * (1 - rate), kept * other, kept * other))
        size = others + 1
        there = min(1.0, most / size)
        rest = min(size, most) - 1
        found.append((p * rate * there, rest * other + 1, rest * other))
        found.append((p * rate * (1 - there), most * other, most * other))
    return [case for case in found if case[0] > 0]


def spent(cases: Sequence[Case], sigma: float, releases: int, delta: float) -> float:
    """Epsilon, from below, of so many releases of noised sums with these means, one pair of datasets, either way round."""
    probability, first, second = np.array(cases).T
    low, high = min(first.min(), second.min()) - 9 * sigma, max(first.max(), second.max()) + 9 * sigma
    x = np.linspace(low, high, int((high - low) / sigma * 200))
    p, q = (_density(x, probability, means, sigma) for means in (first, second))
    return max(_epsilon(p, q, x[1] - x[0], releases, delta), _epsilon(q, p, x[1] - x[0], releases, delta))


def _density(x: Array, probability: Array, means: Array, sigma: float) -> Array:
    total = np.zeros(len(x))
    for mean in np.unique(means):
        total += probability[means == mean].sum() * np.exp(-(((x - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
    return total


def _epsilon(p: Array, q: Array, dx: float, releases: int, delta: float) -> float:
    index = np.floor(np.log(p / q) / _STEP).astype(int)
    mass = np.bincount(index - index.min(), p * dx)
    size = 2 ** math.ceil(math.log2(releases * len(mass) + 1))
    total = np.maximum(np.fft.irfft(np.fft.rfft(mass, size) ** releases, size), 0)
    losses = _STEP * (np.arange(size) + releases * index.min())
    low, high = 0.0, float(losses[-1]) + 1
    for _ in range(60):
        middle = (low + high) / 2
        above = losses > middle
        left = float((total[above] * -np.expm1(middle - losses[above])).sum())
        low, high = (middle, high) if left > delta else (low, middle)
    return low
