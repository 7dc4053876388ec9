"""What an accountant's history is about: single examples, or units of several; the one says nothing of the other."""

import weakref

from opacus.accountants import IAccountant

from ...errors import ScopeError

_units: "weakref.WeakKeyDictionary[IAccountant, int | None]" = weakref.WeakKeyDictionary()


def units_of(accountant: IAccountant) -> int | None:
    """How many units a scope that charged to ``accountant`` protects; None: single examples, as far as is known."""
    return _units.get(accountant)


def check_loaded(accountant: IAccountant, units: int | None) -> None:
    """A history is loaded that was spent on so many ``units`` (None: on single examples).

    Raises:
        ScopeError: a scope over this accountant protects something else.
    """
    if _units.get(accountant, units) != units:
        mine, theirs = (_words(count) for count in (_units[accountant], units))
        raise ScopeError(
            f"what is loaded was spent on {theirs}, and the open scope protects {mine} (privacy_unit=): that does not add up, and "
            "of what that run spent on these nothing is known."
        )


def _words(units: int | None) -> str:
    return "single examples" if units is None else f"{units} units"


def check_protected(accountant: IAccountant, units: int | None) -> None:
    """A scope that protects so many ``units`` (None: single examples) is about to charge to ``accountant``.

    Raises:
        ScopeError: what it has counted so far is of something else.
    """
    before = _units.get(accountant) if accountant.history else units
    if before != units:
        was, now = map(_words, (before, units))
        raise ScopeError(
            f"the accountant has counted what was spent on {was}, and this scope protects {now} (privacy_unit=): that does not add "
            "up. Pass a new accountant; of the earlier run nothing is known about these."
        )
    _units[accountant] = units


def loaded(accountant: IAccountant, units: int | None) -> None:
    """The history of ``accountant`` is now one that was spent on so many ``units``."""
    _units[accountant] = units
