"""Accountants of Opacus and "pld": made by name, charged, and asked for epsilon. "pld" can be asked without Opacus."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..._validate import fraction, one_of
from ...errors import AccountingError, ScopeError
from . import pld
from .history import Charge
from .rates import Rate, kind_of
from .upper_bound import epsilon_bound, gathered

if TYPE_CHECKING:
    from opacus.accountants import IAccountant

ACCOUNTANTS = ("pld", "prv", "rdp", "gdp")
DELTA = "delta must lie between 0 and 1 and should be well below 1 / (number of examples), such as 1e-5."
_NO_BOUND = (
    "the central limit that the 'gdp' accountant takes is not a bound with Poisson sampling: the true epsilon may be larger. Use "
    "accountant='pld', 'prv' or 'rdp'"
)
# Numbers that "prv" may work on, different charges that "rdp" may, and noise below which their series do not converge.
_GRID_NUMBERS, _RENYI_CHARGES, _LEAST_SIGMA = 4e6, 64, 0.2


@dataclass(frozen=True)
class Spent:
    """An epsilon, and what has to be known of it beside the accountant's name (empty: nothing)."""

    epsilon: float
    remark: str = ""


def make_accountant(accountant: str | IAccountant) -> IAccountant:
    """Return the accountant of that name ("pld", "prv", "rdp", "gdp"), or the given object itself."""
    from opacus.accountants import IAccountant, create_accountant

    if isinstance(accountant, IAccountant):
        return accountant
    return create_accountant(mechanism=one_of("accountant", accountant, ACCOUNTANTS))


def asked(name: str) -> IAccountant:
    """Return an accountant of that name that is only asked what would be spent: of "pld" without an import of Opacus."""
    return pld.PLD() if name == pld.NAME else make_accountant(name)


def is_known(accountant: IAccountant) -> bool:
    """Whether it is one of Opacus's accountants or "pld", and of no class that is derived from them."""
    name = accountant.mechanism()
    return type(accountant) is pld.PLD or (name in ACCOUNTANTS and type(accountant) is type(make_accountant(name)))


def check_knows(accountant: IAccountant, *rates: Rate) -> None:
    """Refuse samplings that an accountant does not know: it would go by what they are not.

    Raises:
        AccountingError: there are some.
    """
    unknown = sorted({kind_of(rate) for rate in rates} - {""})
    if unknown and not isinstance(accountant, pld.PLD):
        raise AccountingError(
            f"the {accountant.mechanism()!r} accountant cannot account for {' and '.join(map(repr, unknown))} sampling, with which "
            'steps are charged here. Use accountant="pld".'
        )


def charge(accountant: IAccountant, noise_multiplier: float, sample_rate: Rate) -> None:
    """Add one release to what ``accountant`` holds.

    Raises:
        ScopeError: the accountant cannot add such a step to its history, which is left as it was.
        AccountingError: it does not know this sampling.
    """
    check_knows(accountant, sample_rate)
    before, last = len(accountant.history), accountant.history[-1:]
    try:
        accountant.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
    except ValueError as error:
        accountant.history[max(0, before - 1) :] = last  # the GDP accountant forgets what was spent when it refuses more
        raise ScopeError(
            f"the {accountant.mechanism()!r} accountant cannot add a step with noise multiplier {noise_multiplier} at rate "
            f'{sample_rate} to its history ({error}). Nothing was released. Use accountant="pld", "prv" or "rdp".'
        ) from error


def epsilon_of(accountant: IAccountant, delta: float) -> float:
    """Return epsilon at ``delta`` for the accountant's history: :func:`spent_by`, without its source.

    Warns where the "gdp" accountant's answer is not a bound, and where an upper bound stands in for an accountant.
    """
    spent = spent_by(accountant, delta)
    if spent.remark:
        warnings.warn(f"epsilon={spent.epsilon:.6g}: {spent.remark}", stacklevel=3)
    return spent.epsilon


def spent_by(accountant: IAccountant, delta: float) -> Spent:
    """Return what the accountant's history spends at ``delta``.

    0 before the first charge; infinite as soon as one step had no noise, whatever the accountant makes of that. Answers within
    seconds for up to a million charges and sigma from 0.01 on: where the accountant would take longer, very different
    charges are rounded to fewer that spend no less, or :func:`epsilon_bound` answers in its place.

    Raises:
        InvalidArgumentError: ``delta`` outside (0, 1).
        AccountingError: the accountant fails on its history, or does not know a sampling in it.
    """
    delta = fraction("delta", delta, DELTA)
    history = [entry for entry in accountant.history if entry[2] > 0]
    if not history:
        return Spent(0.0)
    check_knows(accountant, *(rate for _, rate, _ in history))
    if any(sigma == 0 for sigma, _, _ in history):
        return Spent(math.inf)
    name = accountant.mechanism()
    if not is_known(accountant):
        return Spent(_ask(accountant, delta))  # the user's own
    sampled = any(rate != 1 for _, rate, _ in history)
    if name == "gdp":
        return Spent(_ask(accountant, delta), _NO_BOUND if sampled else "")
    affordable = _affordable(name, history, delta)
    if affordable is not None:
        epsilon = _ask(accountant if affordable == history else _with_history(name, affordable), delta)
        if math.isfinite(epsilon):
            return Spent(epsilon)
    return Spent(epsilon_bound(history, delta), f"an upper bound, since the {name!r} accountant cannot tell for so little noise")


def _ask(accountant: IAccountant, delta: float) -> float:
    with warnings.catch_warnings():
        # Opacus's accountants take logarithms of 0 at rate 1, and advise on their grid of orders.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return float(accountant.get_epsilon(delta))
        except ValueError as error:
            raise AccountingError(
                f"the {accountant.mechanism()!r} accountant cannot tell epsilon at delta={delta} for its history ({error}). "
                'What was charged is kept; use accountant="pld", "prv" or "rdp" for such steps.'
            ) from error


def _affordable(name: str, history: list[Charge], delta: float) -> list[Charge] | None:
    """Return ``history``, rounded to fewer charges if need be, such that an accountant takes seconds for it; else None."""
    least, size = min(sigma for sigma, _, _ in history), 1.0
    if name == pld.NAME:  # rounds by itself
        return history if least >= pld.LEAST_SIGMA else None
    if name == "prv":  # numbers in the grid of privacy losses: Opacus's own choice for the accuracy it is asked for
        steps = sum(count for _, _, count in history)
        reach = epsilon_bound(history, delta / 4000) + 3
        size = 2 * reach / (0.01 / math.sqrt(steps * math.log(12_000 / delta) / 2))
    most = _GRID_NUMBERS / size if name == "prv" else _RENYI_CHARGES
    if least < _LEAST_SIGMA or most < 4:
        return None
    return history if len(history) <= most else gathered(history, int(most))


def _with_history(name: str, history: Sequence[Charge]) -> IAccountant:
    accountant = asked(name)
    accountant.history = list(history)
    return accountant


def epsilon_for(accountant: IAccountant, history: Sequence[Charge], delta: float) -> float:
    """Return what an accountant of this kind would say if its history were ``history``; nothing is charged."""
    return spent_by(_with_history(accountant.mechanism(), history), delta).epsilon
