"""Exact bounds from counts of binomial trials."""

import math

import torch
from torch import Tensor


def log_probabilities(n: int, p: float) -> Tensor:
    """Return the logarithms ``[n + 1]`` of the probabilities of 0 to n successes in n trials, float64; p in (0, 1)."""
    k = torch.arange(n + 1, dtype=torch.float64, device="cpu")
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return ways + k * math.log(p) + (n - k) * math.log1p(-p)


def at_least(k: int, n: int, p: float) -> float:
    """Return the probability of k or more successes in n trials."""
    if k <= 0:
        return 1.0
    return min(1.0, float(log_probabilities(n, p)[k:].exp().sum()))


def lower_bound(k: int, n: int, error: float) -> float:
    """Return a bound that the probability of a success exceeds, except with probability ``error``, if k of n were some.

    Clopper and Pearson, Biometrika 1934, one-sided.
    """
    if k == 0:
        return 0.0
    low, high = 0.0, k / n
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if at_least(k, n, min(max(middle, 1e-300), 1 - 1e-16)) <= error else (low, middle)
    return low


def upper_bound(k: int, n: int, error: float) -> float:
    """Return a bound that the probability of a success is below, likewise."""
    return 1 - lower_bound(n - k, n, error)
