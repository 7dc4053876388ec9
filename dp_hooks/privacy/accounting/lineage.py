"""Lineage: which saved histories are of the run that an accountant counts."""

import weakref
from collections.abc import Iterable

from opacus.accountants import IAccountant

from .history import Charge, History, continues, joined, unknown


class Lineage:
    """Tells what was saved of a run, or what it went on from, from what another run has spent.

    Numbers alone do not: runs with the same settings have histories of which one begins as the other, and what they have spent
    adds up.
    """

    def __init__(self) -> None:
        """Nothing was saved or loaded."""
        self._saved: set[int] = set()  # after how many releases
        self._loaded: History = []

    def save(self, history: Iterable[Charge]) -> None:
        """The ``history`` of the run is about to be saved."""
        self._saved.add(_releases(history))

    def joined(self, spent: Iterable[Charge], loaded: Iterable[Charge]) -> tuple[History, bool]:
        """Return the history with which a run that has ``spent`` so much goes on from what was saved; and whether it is ``spent``.

        Raises:
            ScopeError: the run has taken steps, and what is ``loaded`` was not saved of it, nor is it what it went on from.
        """
        now, then = _plain(spent), _plain(loaded)
        of_this_run = (continues(then, now) and _releases(then) in self._saved) or continues(then, self._loaded)
        if then and now != self._loaded and not of_this_run:
            raise unknown(now, then)
        return joined(now, then)

    def went_on(self, history: Iterable[Charge]) -> None:
        """The run goes on with the ``history`` that :meth:`joined` returned."""
        self._loaded = _plain(history)


_lineages: "weakref.WeakKeyDictionary[IAccountant, Lineage]" = weakref.WeakKeyDictionary()


def lineage_of(accountant: IAccountant) -> Lineage:
    """The lineage of the run that ``accountant`` counts, in whatever scopes."""
    return _lineages.setdefault(accountant, Lineage())


def _plain(history: Iterable[Charge]) -> History:
    return [(sigma, rate, steps) for sigma, rate, steps in history]


def _releases(history: Iterable[Charge]) -> int:
    return sum(steps for _, _, steps in history)
