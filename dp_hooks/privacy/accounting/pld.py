"""What the accountant "pld" calculates: privacy loss distributions, composed numerically; never below the truth."""

import functools
import math
from collections.abc import Sequence

from ..._validate import fraction
from .allocation_loss import AllocationLoss
from .composition import composed_epsilon
from .history import Charge, History, add_charge
from .privacy_loss import Loss, PrivacyLoss
from .rates import TRUNCATED, Rate, most_likely
from .truncated_loss import truncated_loss
from .upper_bound import epsilon_bound, gathered, gaussian_epsilon

NAME = "pld"
LEAST_SIGMA = 0.02  # below, the integrals need too many pieces
_LEAST_OF_ALLOCATION = 0.05  # below, likelihood ratios leave the range of float64
_MOST_KINDS = 32  # different charges that are told apart
_OUTSIDE = 1e-6  # of delta: the losses that are left out


class PLD:
    """Accounts for Gaussian releases by their privacy loss distributions: with Poisson sampling, truncated or not, random
    allocation, or without amplification (:mod:`.rates`).

    Epsilon is an upper bound, at most a few thousandths above the exact one as a rule, for charges of any kind in any order;
    both directions, an example removed and an example added, are worked out, and the larger epsilon counts. Sources: Sommer,
    Meiser and Mohammadi, PETS 2019; Koskela et al., AISTATS 2020; Doroshenko et al., PETS 2022 (arXiv:2207.04380). See
    :func:`pld_epsilon`.
    """

    def __init__(self) -> None:
        """Begin with an empty history."""
        self.history: History = []

    def step(self, *, noise_multiplier: float, sample_rate: Rate) -> None:
        """Charge one release."""
        add_charge(self.history, noise_multiplier, sample_rate)

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon spent at ``delta``: 0 before the first charge, infinite after one without noise.

        Raises:
            InvalidArgumentError: ``delta`` outside (0, 1).
        """
        kept = [(sigma, tuple(rate) if isinstance(rate, list) else rate, steps) for sigma, rate, steps in self.history]
        history = tuple(charge for charge in kept if charge[2] > 0)
        return pld_epsilon(history, fraction("delta", delta, "pass a number between 0 and 1."))

    def __len__(self) -> int:
        """How many entries the history has, as with Opacus's accountants."""
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """The name of the accountant."""
        return NAME


@functools.lru_cache(maxsize=256)
def pld_epsilon(history: tuple[Charge, ...], delta: float) -> float:
    """Return an upper bound of the epsilon that the releases of ``history`` spend at ``delta``.

    Takes up to some tenths of a second for a million steps of one kind. Of more than 32 kinds of charges some are rounded
    (:func:`gathered`); with less noise than sigma = 0.02, or a delta too small for float64, it is :func:`epsilon_bound`.
    """
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    kinds = gathered(history, _MOST_KINDS)
    if sum(steps * most_likely(rate) * math.erf(1 / (math.sqrt(8) * sigma)) for sigma, rate, steps in kinds) <= delta:
        return 0.0  # delta at epsilon 0 is at most the sum of those of the releases
    full = [(sigma, steps) for sigma, rate, steps in kinds if rate == 1]
    if len(full) == len(kinds):
        return gaussian_epsilon(math.sqrt(sum(steps / sigma**2 for sigma, steps in full)), delta)
    tiny = _OUTSIDE * delta < 1e-290 * sum(steps for _, _, steps in kinds)
    if any(sigma < _least_sigma(rate) or (tiny and isinstance(rate, tuple)) for sigma, rate, _ in kinds):
        return epsilon_bound(kinds, delta)
    removed = _one_direction(kinds, delta, removed=True)
    added = _most_added(kinds)
    if added > removed:  # else no distribution is needed
        added = _one_direction(kinds, delta, removed=False)
    unamplified = gaussian_epsilon(math.sqrt(sum(steps / sigma**2 for sigma, _, steps in kinds)), delta)
    epsilon = min(max(removed, added), unamplified)
    return epsilon if epsilon < unamplified else epsilon_bound(kinds, delta)


def _most_added(kinds: Sequence[Charge]) -> float:
    """Return the largest loss that the releases can have together when an example is added: ``-log(1 - q)`` each."""
    rates = [(rate, steps) for _, rate, steps in kinds if not isinstance(rate, tuple) and rate < 1]
    return math.inf if len(rates) < len(kinds) else -sum(steps * math.log1p(-rate) for rate, steps in rates)


def _least_sigma(rate: Rate) -> float:
    if isinstance(rate, tuple):
        return 2 * LEAST_SIGMA if rate[0] == TRUNCATED else _LEAST_OF_ALLOCATION
    return LEAST_SIGMA


def loss_of(sigma: float, rate: Rate, *, removed: bool, outside: float) -> Loss:
    """Return the privacy loss of one release in one direction, but for a probability of about ``outside``."""
    if not isinstance(rate, tuple):
        return PrivacyLoss(sigma, rate, removed=removed, outside=outside)
    if rate[0] == TRUNCATED:
        return truncated_loss(sigma, *rate[1:], removed=removed, outside=outside)
    return AllocationLoss(sigma, rate[1], removed=removed, outside=outside)


def _one_direction(kinds: Sequence[Charge], delta: float, *, removed: bool) -> float:
    full = [(sigma, steps) for sigma, rate, steps in kinds if rate == 1]
    sampled = [charge for charge in kinds if charge[1] != 1]
    if full:  # Gaussian releases add up to one, of which equal parts make so many again
        count = sum(steps for _, steps in full)
        sampled.append((math.sqrt(count / sum(steps / sigma**2 for sigma, steps in full)), 1.0, count))
    outside = max(_OUTSIDE * delta / sum(steps for _, _, steps in kinds), 1e-300)
    releases = [(loss_of(sigma, rate, removed=removed, outside=outside), steps) for sigma, rate, steps in sampled]
    epsilon = composed_epsilon(releases, delta)
    return epsilon if removed else min(epsilon, _most_added(kinds))
