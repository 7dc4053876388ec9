"""The accountant "pld": privacy loss distributions, composed numerically; never below the truth."""

import functools
import math
from collections.abc import Sequence

from opacus.accountants import IAccountant, register_accountant

from ..._validate import fraction
from .composition import composed_epsilon
from .history import add_charge
from .privacy_loss import PrivacyLoss
from .upper_bound import Charge, epsilon_bound, gathered, gaussian_epsilon

NAME = "pld"
LEAST_SIGMA = 0.02  # below, the integrals need too many pieces
_MOST_KINDS = 32  # different charges that are told apart
_OUTSIDE = 1e-6  # of delta: the losses that are left out


class PLDAccountant(IAccountant):  # type: ignore[misc]
    """Accounts for Poisson-sampled Gaussian releases by their privacy loss distributions.

    Epsilon is an upper bound, at most a few thousandths above the exact one as a rule, for charges of any kind in any order;
    both directions, an example removed and an example added, are worked out, and the larger epsilon counts. Registered
    with Opacus as "pld" when ``dp_hooks`` is imported. Sources: Sommer, Meiser and Mohammadi, PETS 2019; Koskela et al.,
    AISTATS 2020; Doroshenko et al., PETS 2022 (arXiv:2207.04380). See :func:`pld_epsilon`.
    """

    def __init__(self) -> None:
        """Begin with an empty history."""
        self.history: list[Charge] = []

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Charge one release."""
        add_charge(self.history, noise_multiplier, sample_rate)

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon spent at ``delta``: 0 before the first charge, infinite after one without noise.

        Raises:
            InvalidArgumentError: ``delta`` outside (0, 1).
        """
        history = tuple((sigma, rate, steps) for sigma, rate, steps in self.history if steps > 0)
        return pld_epsilon(history, fraction("delta", delta, "pass a number between 0 and 1."))

    def __len__(self) -> int:
        """How many entries the history has, as with Opacus's accountants."""
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """The name that the accountant is registered by."""
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
    if sum(steps * rate * math.erf(1 / (math.sqrt(8) * sigma)) for sigma, rate, steps in kinds) <= delta:
        return 0.0  # delta at epsilon 0 is at most the sum of those of the releases
    full = [(sigma, steps) for sigma, rate, steps in kinds if rate == 1]
    if len(full) == len(kinds):
        return gaussian_epsilon(math.sqrt(sum(steps / sigma**2 for sigma, steps in full)), delta)
    if min(sigma for sigma, _, _ in kinds) < LEAST_SIGMA:
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
    return math.inf if any(rate == 1 for _, rate, _ in kinds) else -sum(steps * math.log1p(-rate) for _, rate, steps in kinds)


def _one_direction(kinds: Sequence[Charge], delta: float, *, removed: bool) -> float:
    full = [(sigma, steps) for sigma, rate, steps in kinds if rate == 1]
    sampled = [charge for charge in kinds if charge[1] < 1]
    if full:  # Gaussian releases add up to one, of which equal parts make so many again
        count = sum(steps for _, steps in full)
        sampled.append((math.sqrt(count / sum(steps / sigma**2 for sigma, steps in full)), 1.0, count))
    outside = max(_OUTSIDE * delta / sum(steps for _, _, steps in kinds), 1e-300)
    releases = [(PrivacyLoss(sigma, rate, removed=removed, outside=outside), steps) for sigma, rate, steps in sampled]
    epsilon = composed_epsilon(releases, delta)
    return epsilon if removed else min(epsilon, _most_added(kinds))


register_accountant(NAME, PLDAccountant, force=True)  # anew where the package is loaded again
