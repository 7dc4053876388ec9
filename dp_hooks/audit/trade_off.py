"""What is known of a run from how often a test of single canaries was right: how much noise there can have been, at most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..privacy.accounting.history import Charge
from ..privacy.accounting.opacus import epsilon_for, make_accountant
from .binomial import lower_bound, upper_bound

_TRIED = 2  # deltas, of those at which most is told: all are bounds, whichever are taken
_LEAST, _MOST = 1 / 16, 16.0  # the noise, in units of what is stated, that is looked for


@dataclass(frozen=True)
class Rates:
    """How often a test said "in": of canaries that were in at least ``true``, of those that were not at most ``false``."""

    true: float
    false: float

    @classmethod
    def of(cls, right: int, inside: int, wrong: int, outside: int, error: float) -> "Rates":
        """Bounds that hold together except with probability ``error``, from counts among those inside and those outside."""
        return cls(lower_bound(right, inside, error / 2), upper_bound(wrong, outside, error / 2))

    def epsilon(self, delta: float) -> float:
        """Return an epsilon that is exceeded at ``delta``; 0 if nothing can be said.

        A test of an (epsilon, delta)-private mechanism has ``true <= e^epsilon false + delta``, and ``1 - false`` likewise
        (Wasserman and Zhou 2010, Kairouz et al. 2015).
        """
        found = 0.0
        for more, less in ((self.true, self.false), (1 - self.false, 1 - self.true)):
            if more > delta and less > 0:
                found = max(found, math.log((more - delta) / less))
        return found


def noise_at_most(rates: Rates, history: Sequence[Charge], deltas: Sequence[float]) -> float:
    """Return a factor: with more than it times the noise of ``history`` no test is right as often as ``rates``; infinity: not
    known.

    For each of ``deltas`` that is the noise at which the accountant "pld", which is never below the truth, gives less than
    :meth:`Rates.epsilon`, looked for at those that tell most; the least of these counts.
    """
    told: list[tuple[float, float]] = []  # the share of the stated epsilon that is exceeded at each
    for delta in deltas:
        stated = scaled_epsilon(1.0, history, delta)
        told.append((rates.epsilon(delta) / stated if 0 < stated < math.inf else 0.0, delta))
    best = [delta for _, delta in sorted(told, reverse=True)[:_TRIED]]
    return min((_factor(rates.epsilon(delta), history, delta) for delta in best), default=math.inf)


def _factor(epsilon: float, history: Sequence[Charge], delta: float) -> float:
    low, high = math.log(_LEAST), math.log(_MOST)
    if epsilon <= 0 or scaled_epsilon(_MOST, history, delta) >= epsilon:
        return math.inf
    while high - low > 2e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if scaled_epsilon(math.exp(middle), history, delta) < epsilon else (middle, high)
    return math.exp(high)


def scaled_epsilon(factor: float, history: Sequence[Charge], delta: float) -> float:
    """Return the epsilon of ``history`` with ``factor`` times its noise."""
    return epsilon_for(make_accountant("pld"), [(factor * sigma, rate, steps) for sigma, rate, steps in history], delta)
