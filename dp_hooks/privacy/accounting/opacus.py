"""Opacus's accountants: made by name, charged, and asked for epsilon."""

import math
import warnings
from collections.abc import Sequence

from opacus.accountants import IAccountant, create_accountant

from ..._validate import fraction, one_of
from ...errors import AccountingError, ScopeError

ACCOUNTANTS = ("prv", "rdp", "gdp")
DELTA = "delta must lie between 0 and 1 and should be well below 1 / (number of examples), such as 1e-5."


def make_accountant(accountant: str | IAccountant) -> IAccountant:
    """Return the Opacus accountant of that name ("prv", "rdp", "gdp"), or the given object itself."""
    if isinstance(accountant, IAccountant):
        return accountant
    return create_accountant(mechanism=one_of("accountant", accountant, ACCOUNTANTS))


def charge(accountant: IAccountant, noise_multiplier: float, sample_rate: float) -> None:
    """Add one release to what ``accountant`` holds.

    Raises:
        ScopeError: the accountant cannot add such a step to its history, which is left as it was.
    """
    before = list(accountant.history)
    try:
        accountant.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
    except ValueError as error:
        accountant.history = before  # the GDP accountant forgets what was spent when it refuses more
        raise ScopeError(
            f"the {accountant.mechanism()!r} accountant cannot add a step with noise multiplier {noise_multiplier} at rate "
            f'{sample_rate} to its history ({error}). Nothing was released. Use accountant="prv" or "rdp".'
        ) from error


def epsilon_of(accountant: IAccountant, delta: float) -> float:
    """Return epsilon at ``delta`` for the accountant's history.

    0 before the first charge; infinite as soon as one step had no noise, whatever the accountant makes of that.

    Raises:
        InvalidArgumentError: ``delta`` outside (0, 1).
        AccountingError: the accountant fails on its history.
    """
    delta = fraction("delta", delta, DELTA)
    history = [entry for entry in accountant.history if entry[2] > 0]
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    with warnings.catch_warnings():
        # Opacus's accountants take logarithms of 0 at rate 1, and advise on their grid of orders.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return float(accountant.get_epsilon(delta))
        except ValueError as error:
            raise AccountingError(
                f"the {accountant.mechanism()!r} accountant cannot tell epsilon at delta={delta} for its history ({error}). "
                'What was charged is kept; use accountant="prv" or "rdp" for such steps.'
            ) from error


def epsilon_after(accountant: IAccountant, more: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return what :func:`epsilon_of` would be after ``more`` (sigma, sample rate, steps) as well; nothing is charged."""
    trial = create_accountant(mechanism=accountant.mechanism())
    trial.history = [*accountant.history, *more]
    return epsilon_of(trial, delta)
