"""How likely large batches are: tails of the binomial distribution, with nearly all digits, however small they are."""

import math

import numpy as np

_TERMS = 4096  # of a tail that are added up at a time


def at_least(least: int, trials: int, rate: float) -> float:
    """Return the probability of ``least`` or more successes in so many ``trials``, to a relative error below 1e-9."""
    if least <= 0 or rate == 1:
        return 1.0 if least <= trials else 0.0
    if least <= trials * rate:  # then the other tail is the smaller one
        return 1.0 - _tail(trials - least + 1, trials, 1 - rate, rate)
    return _tail(least, trials, rate, 1 - rate)


def exactly(count: int, trials: int, rate: float) -> float:
    """Return the probability of so many successes, with the same error."""
    if rate == 1:
        return float(count == trials)
    return math.exp(_log_probability(count, trials, rate, 1 - rate))


def most_drawn(trials: int, rate: float, probability: float) -> int:
    """Return the smallest number that is exceeded with at most this ``probability``."""
    low, high = -1, trials
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at_least(middle + 1, trials, rate) <= probability else (middle, high)
    return high


def _tail(least: int, trials: int, rate: float, other: float) -> float:
    """The same above the mean; ``other`` is 1 - ``rate``."""
    if least > trials:
        return 0.0
    total, term, at = 0.0, 1.0, least
    while at < trials and term > 1e-17 * total:
        k = np.arange(at, min(at + _TERMS, trials), dtype=np.float64)
        terms = term * np.cumprod(np.concatenate([[1.0], (trials - k) / (k + 1) * (rate / other)]))
        total, term, at = total + float(terms[:-1].sum()), float(terms[-1]), at + len(k)
    return min(1.0, math.exp(_log_probability(least, trials, rate, other) + math.log(total + term)))


def _log_probability(k: int, n: int, rate: float, other: float) -> float:
    """By Stirling's formula with its error, and deviances without cancellation.

    Source: C. Loader, "Fast and Accurate Computation of Binomial Probabilities", 2000.
    """
    if k in (0, n):
        return n * (math.log(rate) if k else math.log1p(-rate))
    above = k - n * rate
    deviance = _deviance(k, above) + _deviance(n - k, -above)
    return _error(n) - _error(k) - _error(n - k) - deviance - 0.5 * math.log(2 * math.pi * k * ((n - k) / n))


def _error(n: int) -> float:
    """Return ``log n!`` less Stirling's formula for it."""
    if n < 16:
        return math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi)
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / (1680 * n * n)) / (n * n)) / (n * n)) / n


def _deviance(x: float, above: float) -> float:
    """Return ``x log(x / m) - (x - m)`` for a mean m that x is so much ``above``."""
    mean = x - above
    v = above / (x + mean)
    if abs(v) > 0.1:
        return x * math.log(x / mean) - above
    total, power, j = above * v, 2 * x * v, 1
    while True:
        power *= v * v
        larger = total + power / (2 * j + 1)
        if larger == total:
            return total
        total, j = larger, j + 1
