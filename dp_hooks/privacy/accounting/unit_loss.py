"""Epsilon of units of several examples where single examples were drawn and clipped: mixtures of Gaussians."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from opacus.accountants import IAccountant

from ..._validate import bad, fraction, positive_int
from .composition import composed_epsilon
from .history import Charge
from .opacus import DELTA
from .pld import LEAST_SIGMA, pld_epsilon
from .privacy_loss import _PIECES_PER_SCALE, Array, PrivacyLoss
from .rates import kind_of, number
from .upper_bound import gathered, gaussian_epsilon

_MOST_KINDS = 32  # different charges that are told apart
_OUTSIDE = 1e-6  # of delta: the losses that are left out
_LARGE = 500.0  # exponentials of more are not taken
_NEWTON = 50  # steps at most; about six are enough
_MOST_WORK = 1e6  # pieces times parts of a mixture: some seconds


class UnitLoss(PrivacyLoss):
    """The loss of one Poisson-sampled Gaussian release for a unit with k examples, each clipped for itself.

    J, how many of them are in the batch, is binomial, and together they move the sum by a vector of length J at most, in units
    of the sensitivity. The densities are the mixture ``sum_j P(J = j) N(j, sigma^2)`` and ``N(0, sigma^2)``: a dominating pair, in
    each direction, for a unit replaced by null records (Charles et al., "Fine-Tuning Large Language Models with User-Level
    Differential Privacy", arXiv:2407.07737, on example-level sampling; for vectors: Choquette-Choo et al., ICLR 2024,
    arXiv:2310.15526, Corollary 4.7). A unit with fewer examples spends less.

    Numbers j that are too unlikely are left out of the mixture: where the sample is from it, as losses without bound (they are
    in ``outside``); else that makes losses larger.
    """

    def __init__(self, sigma: float, rate: float, examples: int, *, removed: bool, outside: float) -> None:
        """As for :class:`PrivacyLoss`, with ``rate`` below 1 and k = ``examples``."""
        self._log_weights = log_weights = _binomial(examples, rate, outside)
        self._tail = max(0.0, 1.0 - math.fsum(np.exp(log_weights)))
        super().__init__(sigma, rate, removed=removed, outside=outside)
        most = len(log_weights) - 1
        if removed:
            self._high += most - 1.0
            self.outside += self._tail + most * 1e-16  # and what rounding may hide of it
        pieces = math.ceil((self._high - self._low) / min(sigma, 3 * sigma**2) * _PIECES_PER_SCALE)
        self._pieces = np.linspace(self._low, self._high, pieces + 1)

    def _exponent(self, x: Array, j: int) -> Array:
        return (j * x - j * j / 2) / self.sigma**2

    def _mixture_over_gaussian(self, x: Array) -> Array:
        change = np.full_like(x, -self._tail)
        for j, log_weight in enumerate(self._log_weights[1:], 1):
            change += math.exp(log_weight) * np.expm1(np.minimum(self._exponent(x, j), _LARGE))
        loss: Array = np.log1p(np.maximum(change, -0.5))
        large = np.abs(change) >= 0.5
        if large.any():
            some = x[large]
            total = np.full_like(some, self._log_weights[0])
            for j, log_weight in enumerate(self._log_weights[1:], 1):
                total = np.logaddexp(total, log_weight + self._exponent(some, j))
            loss[large] = total
        return loss

    def _where(self, loss: Array) -> Array:
        """As for one example, by Newton's method: ``log sum_{j > 0} P(j) e^(...)`` is convex in x, and approached from above."""
        loss = loss if self.removed else -loss
        first = float(self._log_weights[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            small = np.log(np.maximum(np.expm1(np.minimum(loss, _LARGE)) - math.expm1(first), 0.0))
            wanted = np.where(loss < _LARGE, small, loss + np.log1p(-np.exp(first - np.maximum(loss, 1.0))))
        numbers = np.arange(1, len(self._log_weights))
        bounds = ((wanted - log_weight) * self.sigma**2 / j + j / 2 for j, log_weight in enumerate(self._log_weights[1:], 1))
        x: Array = functools.reduce(np.minimum, bounds)
        open_ = np.isfinite(x)
        for _ in range(_NEWTON):
            some = x[open_]
            if not len(some):
                break
            terms = np.stack([log_weight + self._exponent(some, j) for j, log_weight in enumerate(self._log_weights[1:], 1)])
            largest = terms.max(0)
            parts = np.exp(terms - largest)
            total = parts.sum(0)
            over = largest + np.log(total) - wanted[open_]
            step = over * self.sigma**2 * total / (numbers @ parts)
            x[open_] = some - step
            going = np.abs(step) > 1e-15 * (np.abs(some) + self.sigma**2)
            open_[open_] = going & (over > 0)
        return x


def _binomial(examples: int, rate: float, outside: float) -> Array:
    """Logarithms of the probabilities of 0, 1, ... successes; those that are left out are less likely than ``outside``."""
    logs, left = [examples * math.log1p(-rate)], math.log(outside) - 1
    for j in range(examples):
        following = logs[-1] + math.log((examples - j) / (j + 1)) + math.log(rate) - math.log1p(-rate)
        share = (examples - j) / (j + 1) * rate / (1 - rate)  # of what follows each falls by at least that
        if share < 0.5 and following + math.log(2) < left:
            break
        logs.append(following)
    return np.array(logs)


@functools.lru_cache(maxsize=256)
def unit_epsilon(history: tuple[Charge, ...], examples: int, delta: float) -> float:
    """Return an upper bound, at ``delta``, of what releases of sums over clipped examples spend on a unit with so many of them.

    ``history`` has the noise multiplier of each release in units of what one example can move the sum by, and the rate at which
    single examples were drawn. At rate 1, with less noise than sigma = 0.02, and where very many examples of a unit are drawn
    together, nothing is taken to be gained by sampling: the releases are Gaussian, of sensitivity ``examples``.
    """
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    if examples == 1:
        return pld_epsilon(history, delta)
    gathered_kinds = gathered((charge for charge in history if charge[2] > 0), _MOST_KINDS)
    kinds = [(sigma, number(rate), steps) for sigma, rate, steps in gathered_kinds]
    if not kinds:
        return 0.0
    full = sum(steps / sigma**2 for sigma, rate, steps in kinds if rate == 1)
    unamplified = gaussian_epsilon(examples * math.sqrt(sum(steps / sigma**2 for sigma, _, steps in kinds)), delta)
    count = sum(steps for _, rate, steps in kinds if rate == 1)
    sampled = [charge for charge in kinds if charge[1] < 1]
    noise = [sigma for sigma, _, _ in sampled] + ([math.sqrt(count / full) / examples] if full else [])
    if not sampled or min(noise) < LEAST_SIGMA:
        return unamplified
    outside = max(_OUTSIDE * delta / sum(steps for _, _, steps in kinds), 1e-300)
    if any(_work(sigma, _binomial(examples, rate, outside), outside) > _MOST_WORK for sigma, rate, _ in sampled):
        return unamplified
    found = []
    for removed in (True, False):
        releases: list[tuple[PrivacyLoss, int]] = [
            (UnitLoss(sigma, rate, examples, removed=removed, outside=outside), steps) for sigma, rate, steps in sampled
        ]
        if full:
            releases.append((PrivacyLoss(noise[-1], 1.0, removed=removed, outside=outside), count))
        found.append(composed_epsilon(releases, delta))
    return min(max(found[0], min(found[1], _most_added(kinds, examples))), unamplified)


def _work(sigma: float, log_weights: Array, outside: float) -> float:
    """How many exponentials it takes to know the loss once on each piece."""
    reach = 2 * sigma * math.sqrt(-2 * math.log(outside)) + len(log_weights)
    return len(log_weights) * reach / min(sigma, 3 * sigma**2) * _PIECES_PER_SCALE


def epsilon_of_units(accountant: IAccountant, delta: float, examples: int, *, by_units: bool) -> float:
    """Return :func:`unit_epsilon` of what an accountant was charged with, for units with at most so many ``examples``.

    Raises:
        InvalidArgumentError: an argument cannot be used; a sampling is not known here; or the accountant counts releases on units
            as it is, ``by_units``.
    """
    most = positive_int("examples_per_unit", examples, "pass the largest number of examples that a unit has in the dataset.")
    if by_units:
        raise bad("examples_per_unit", examples, "with privacy_unit= epsilon is that of units as it is; leave it out.")
    history = tuple((sigma, rate, steps) for sigma, rate, steps in accountant.history)
    unknown = sorted({kind_of(rate) for _, rate, _ in history} - {""})
    if unknown:
        raise bad("examples_per_unit", examples, f"of {unknown[0]!r} sampling it is not known what units spend. Use 'poisson'.")
    return unit_epsilon(history, most, fraction("delta", delta, DELTA))


def _most_added(kinds: Sequence[tuple[float, float, int]], examples: int) -> float:
    """Return the largest loss that the releases can have together when a unit is added: ``-k log(1 - q)`` each."""
    if any(rate == 1 for _, rate, _ in kinds):
        return math.inf
    return -examples * sum(steps * math.log1p(-rate) for _, rate, steps in kinds)
