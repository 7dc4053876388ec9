"""What right guesses of fair coins say of epsilon, whatever the mechanism is."""

import math

import torch

from .binomial import log_probabilities

_MOST = 50.0


def epsilon_from_guesses(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """Return an epsilon that a mechanism exceeds at ``delta``, except with probability ``error``: Steinke, Nasr and Jagielski 2023.

    Each of so many ``canaries`` was put in or left out by a fair coin, and ``guesses`` of the coins were guessed, ``right`` of them
    rightly, from all that was released. How many are guessed has to be fixed before. Nothing is assumed of the mechanism, not even
    that what it does to one canary does not depend on the others (arXiv:2305.08846, Theorem 5.2); 0 if nothing can be said.
    """
    if right == 0 or _chance(canaries, guesses, right, delta, 0.0) > error:
        return 0.0
    low, high = 0.0, _MOST
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if _chance(canaries, guesses, right, delta, middle) <= error else (low, middle)
    return low


def _chance(canaries: int, guesses: int, right: int, delta: float, epsilon: float) -> float:
    """Bound the probability of so many right guesses from an (epsilon, delta)-private mechanism.

    With delta 0 the number of right guesses is at most binomial, each right with probability ``1 / (1 + e^-epsilon)``. With delta
    there
    are at most ``2 m delta`` more ways to be that much better, of which the worst number i counts: the mean probability of the i
    counts below ``right``.
    """
    probabilities = log_probabilities(guesses, min(1 / (1 + math.exp(-epsilon)), 1 - 1e-16)).exp()
    below = probabilities[:right].flip(0).cumsum(0) / torch.arange(1, right + 1, dtype=torch.float64, device="cpu")
    return float(probabilities[right:].sum() + 2 * canaries * delta * below.max())
