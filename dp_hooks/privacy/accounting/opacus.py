"""Opacus's accountants: made by name, and asked for epsilon."""

import math
import warnings

from opacus.accountants import IAccountant, create_accountant

from ..._validate import fraction, one_of
from ...errors import AccountingError

ACCOUNTANTS = ("prv", "rdp", "gdp")
DELTA = "delta must lie between 0 and 1 and should be well below 1 / (number of examples), such as 1e-5."


def make_accountant(accountant: str | IAccountant) -> IAccountant:
    """Return the Opacus accountant of that name ("prv", "rdp", "gdp"), or the given object itself."""
    if isinstance(accountant, IAccountant):
        return accountant
    return create_accountant(mechanism=one_of("accountant", accountant, ACCOUNTANTS))


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
