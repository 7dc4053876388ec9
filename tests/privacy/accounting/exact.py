"""The true epsilon of Poisson-sampled Gaussian releases, by a way that has nothing in common with the library's.

It is the inverse Laplace transform of the moment generating function of the sum of losses S,
``E[(1 - e^(eps - S))+] = 1 / (2 pi i) integral of E[e^(s S)] e^(-s eps) / (s (s + 1)) ds`` along a vertical line through a saddle
point t > 0; there is no grid of losses in it, and nothing is rounded to any side. It resolves many releases with some noise in
the sum; few releases at a small rate, whose sum is nearly always the same number, it does not: :class:`Unresolved`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Charge = tuple[float, float, int]


class Unresolved(Exception):
    """The transform decays too slowly for the number of points."""


def _losses(sigma: float, rate: float, removed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Losses and the logarithms of their probabilities: Gauss-Legendre of order 20 on 400 pieces."""
    reach = 14 * sigma
    edges = np.linspace(-reach, reach + 1, 401)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    half = (edges[1] - edges[0]) / 2
    x = ((edges[:-1] + edges[1:]) / 2)[:, None] + half * nodes
    gaussian = -((x / sigma) ** 2) / 2 - math.log(sigma) - math.log(2 * math.pi) / 2
    z = (x - 0.5) / sigma**2
    loss = (
        z
        if rate == 1
        else np.where(z > 1, np.logaddexp(math.log1p(-rate), math.log(rate) + z), np.log1p(rate * np.expm1(np.minimum(z, 1))))
    )
    log_probability = gaussian + loss if removed else gaussian
    return (loss if removed else -loss).ravel(), (log_probability + np.log(half * weights)).ravel()


class Truth:
    """Delta and epsilon of a history in one direction."""

    def __init__(self, history: Sequence[Charge], delta: float, removed: bool, points: int = 20_000) -> None:
        self.parts = [(*_losses(sigma, rate, removed), steps) for sigma, rate, steps in history]
        t, self.about, self.deviation = self.saddle(delta)
        self.t, self.moment, deviation = t, self._cumulants(t)[0], self.deviation
        step = 2 * math.pi / (50 * deviation)
        values = []
        for first in range(0, points, 200):
            y = step * np.arange(first, first + 200)
            logarithm = np.zeros(len(y), complex)
            for loss, log_probability, steps in self.parts:
                tilted = np.exp(log_probability + t * loss - self._log_moment(loss, log_probability))
                logarithm += steps * np.log(np.exp(1j * np.outer(y, loss)) @ tilted)
            values.append(np.exp(logarithm) / ((t + 1j * y) * (t + 1 + 1j * y)))
            if np.abs(values[-1]).max() < 1e-11 * abs(values[0][0]):
                break
        else:
            raise Unresolved(history)
        self.values = np.concatenate(values)
        self.y, self.values[0] = step * np.arange(len(self.values)), self.values[0] / 2
        self.step = step

    def saddle(self, delta: float) -> tuple[float, float, float]:
        """The tilt at which delta is of the size of the integrand, and the mean and deviation of the tilted sum."""
        low, high = -35.0, -math.log(delta)
        for _ in range(60):
            t = math.exp((low + high) / 2)
            moment, mean, variance = self._cumulants(t)
            below = t * mean - moment + math.log1p(t) < -math.log(delta)
            low, high = (math.log(t), high) if below else (low, math.log(t))
        return t, float(mean), math.sqrt(variance)

    def _log_moment(self, loss: np.ndarray, log_probability: np.ndarray) -> float:
        tilted = log_probability + self.t * loss
        return float(tilted.max() + np.log(np.exp(tilted - tilted.max()).sum()))

    def _cumulants(self, t: float) -> np.ndarray:
        total = np.zeros(3)
        for loss, log_probability, steps in self.parts:
            tilted = log_probability + t * loss
            weights = np.exp(tilted - tilted.max())
            mean = weights @ loss / weights.sum()
            total += steps * np.array([tilted.max() + np.log(weights.sum()), mean, weights @ (loss - mean) ** 2 / weights.sum()])
        return total

    def delta(self, epsilon: float) -> float:
        """The integral, as a sum with equal steps, whose error falls faster than any power of them."""
        share = float((self.values * np.exp(-1j * self.y * epsilon)).real.sum()) * self.step / math.pi
        return math.exp(self.moment - self.t * epsilon) * share

    def epsilon(self, delta: float) -> float:
        """Where delta is reached, looked for from above: far below, what is rounded off is larger than the integral."""
        low = high = self.about + 10 * self.deviation
        while high > 0 and self.delta(high) <= delta:
            low, high = high, high - self.deviation / 20
        high = max(high, 0.0)
        return 0.0 if self.delta(high) <= delta else root(self.delta, delta, high, low)


def root(decreasing: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a function that is larger than ``value`` at ``low``, and not at ``high``, reaches it."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > value else (low, middle)
    return low


def true_epsilon(history: Sequence[Charge], delta: float, points: int = 20_000) -> float:
    """The larger epsilon of the two directions."""
    return max(Truth(history, delta, removed, points).epsilon(delta) for removed in (True, False))
