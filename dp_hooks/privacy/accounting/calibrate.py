"""A budget: its arguments, and the noise with which it lasts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..._validate import bad, fraction, non_negative, positive
from ...errors import AccountingError
from .opacus import DELTA, asked, check_knows, epsilon_for, is_known
from .rates import Rate

if TYPE_CHECKING:
    from opacus.accountants import IAccountant

_LARGEST_SIGMA = 1e4
_LARGEST_EPSILON = 100.0
_SIGMA = "pass 0 or more: it is the standard deviation of the noise in units of the clipping bound."


@dataclass(frozen=True)
class Budget:
    """What may be spent: at most ``epsilon`` at ``delta``, in ``epochs`` passes over the data."""

    epsilon: float
    delta: float
    epochs: float


def check_budget(noise_multiplier: object, target_epsilon: object, target_delta: object, epochs: object) -> float | Budget:
    """Check the four budget arguments together; return the noise multiplier that was given, or the budget that was.

    Raises:
        InvalidArgumentError: both or neither of ``noise_multiplier`` and ``target_epsilon``, or a value out of range.
    """
    delta = None if target_delta is None else fraction("target_delta", target_delta, DELTA)
    if (noise_multiplier is None) == (target_epsilon is None):
        given = "neither" if noise_multiplier is None else "both"
        raise bad(
            "noise_multiplier",
            noise_multiplier,
            f"{given} of noise_multiplier and target_epsilon={target_epsilon!r} given; pass exactly one: a noise "
            "multiplier, or target_epsilon with target_delta and epochs, from which it is calculated.",
        )
    if target_epsilon is None:
        sigma = non_negative("noise_multiplier", noise_multiplier, _SIGMA)
        if epochs is not None:
            raise bad("epochs", epochs, "it only has a meaning with target_epsilon; leave it out with noise_multiplier.")
        return sigma
    epsilon = check_epsilon("target_epsilon", target_epsilon)
    if delta is None:
        raise bad("target_delta", None, f"target_epsilon needs a target_delta: {DELTA}")
    if epochs is None:
        raise bad("epochs", None, "target_epsilon needs the number of passes over the data to spend it on.")
    return Budget(epsilon, delta, positive("epochs", epochs, "pass a number of epochs greater than 0."))


def check_epsilon(name: str, value: object) -> float:
    """Return ``value`` as an epsilon that a budget can have: above 0, and not absurdly large."""
    epsilon = positive(name, value, "pass the epsilon to reach, greater than 0.")
    if epsilon > _LARGEST_EPSILON:
        raise bad(
            name,
            value,
            f"a budget above {_LARGEST_EPSILON:g} protects nobody, and accountants break down there. Pass a smaller one, or "
            "noise_multiplier.",
        )
    return epsilon


def calibrate(accountant: IAccountant, budget: Budget, sample_rate: Rate, releases: int) -> float:
    """Return the noise multiplier with which ``releases`` steps at ``sample_rate`` stay within the budget.

    The result is the larger end of a bracket, so epsilon is never above the target, and at least 99.9 % of it is used
    (less only where the accountant's own resolution is coarser). Opacus's ``get_noise_multiplier`` is not used: it
    starts from 0, where accountants take very long or run out of memory, and need not end for small targets.

    Raises:
        InvalidArgumentError: the accountant holds charges already, which the calculation would leave out, or it cannot
            certify such a small epsilon with any noise.
        AccountingError: the accountant does not know this sampling.
    """
    check_knows(accountant, sample_rate)
    epsilon = budget.epsilon
    if accountant.history:
        raise bad(
            "target_epsilon",
            epsilon,
            "the accountant already holds spent budget, which a noise multiplier calculated for a fresh start would ignore. "
            "To go on with a budget where it stopped, open the scope with a new accountant and the same target_epsilon, "
            "target_delta and epochs, and load what was spent before entering it: "
            "scope.accountant.load_state_dict(saved), where saved = old_accountant.state_dict(). With an engine, call "
            "make_private_with_epsilon of a new one, and then its load_checkpoint.",
        )

    if accountant.mechanism() == "gdp" and sample_rate != 1:
        raise bad(
            "accountant",
            "gdp",
            "its central limit is not an upper bound with Poisson sampling: the noise calculated for target_epsilon would be too "
            'little. Use accountant="pld", "prv" or "rdp".',
        )
    if is_known(accountant):
        return calibrated(accountant.mechanism(), budget, sample_rate, releases)
    return _search(accountant, budget, sample_rate, releases)


@functools.lru_cache(maxsize=64)  # seconds, which a second scope with the same budget need not take again
def calibrated(name: str, budget: Budget, sample_rate: Rate, releases: int) -> float:
    """The same by an accountant of that ``name``, remembered."""
    return _search(asked(name), budget, sample_rate, releases)


def _search(accountant: IAccountant, budget: Budget, sample_rate: Rate, releases: int) -> float:
    epsilon = budget.epsilon

    @functools.cache  # "prv" takes half a second and more for each
    def spent(sigma: float) -> float:
        try:
            return epsilon_for(accountant, [(sigma, sample_rate, releases)], budget.delta)
        except (AccountingError, OverflowError):  # the "gdp" accountant's way to say: beyond all bounds
            return math.inf

    high = 1.0
    while spent(high) > epsilon:
        high *= 2
        if high > _LARGEST_SIGMA:
            raise bad(
                "target_epsilon",
                epsilon,
                f"the {accountant.mechanism()!r} accountant cannot certify it at delta={budget.delta} with any noise. "
                "Pass a larger target_epsilon, or a larger target_delta.",
            )
    low = high / 2
    while spent(low) <= epsilon:
        low, high = low / 2, low
    while epsilon - spent(high) > 1e-3 * epsilon and (high - low) > 1e-4 * high:
        middle = _between(low, high, spent(low), spent(high), epsilon * (1 - 5e-4))
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


def _between(low: float, high: float, at_low: float, at_high: float, wanted: float) -> float:
    """Return where a power law through both ends has the value ``wanted``, well inside of them; else the middle."""
    if not 0 < at_high < wanted < at_low < math.inf:
        return (low + high) / 2
    share = math.log(at_low / wanted) / math.log(at_low / at_high)
    return float(low * (high / low) ** min(max(share, 0.1), 0.9))
