"""A ledger that an open scope writes its charges to, and that bounds what all runs spend together."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BudgetExhaustedError
from .history import Charge, History, add_charge, as_charge, as_json, beyond, joined
from .ledger_contents import FORMAT, Spent
from .ledger_file import LedgerFile, Record
from .opacus import ACCOUNTANTS, epsilon_for, make_accountant
from .rates import Rate

if TYPE_CHECKING:
    from opacus.accountants import IAccountant

# Which run of which file an accountant was charged in: a further scope of this process may go on with it.
_runs: weakref.WeakKeyDictionary[IAccountant, tuple[Path, str]] = weakref.WeakKeyDictionary()


class OpenLedger:
    """A ledger that a scope writes its charges to.

    Attributes:
        spent: what is in it.
        run: the name of this run in it; None before the first charge, if it does not go on with one.
    """

    def __init__(self, file: LedgerFile, spent: Spent, accountant: IAccountant) -> None:
        """Write to ``file``, in which there is ``spent``."""
        self._file, self.spent, self._accountant = file, spent, accountant
        self.run: str | None = None
        self._brought: History = []
        self._safe: tuple[Any, int] | None = None  # a kind of release, and how many more of it are known to fit
        self._pace = 1

    def adopt(self, history: History, run: str | None) -> History:
        """This run has spent ``history`` before, in the run of that name, if it was written to a ledger.

        Returns what it has spent as far as is known: steps that were lost with a process are in the file.

        Raises:
            ScopeError: the file says something else of that run.
        """
        history = [as_charge(entry) for entry in history]
        if run is None:
            path, run = _runs.get(self._accountant, (None, None))
            run = run if path == self.spent.path else None
        if run not in self.spent.runs:
            self.run, self._brought = None, history
            return history
        whole, _ = joined(history, self.spent.runs[run])
        self.run, self._brought = run, beyond(self.spent.runs[run], whole)  # none, unless an older copy of the file was put back
        return whole

    def charge(self, sigma: float, rate: Rate) -> None:
        """Write one release down, before it happens."""
        records: list[Record] = []
        if self.spent.is_new:
            total = self.spent.total
            bounded = None if total is None else [total.epsilon, total.delta]
            records.append({"kind": "ledger", "format": FORMAT, "examples": self.spent.examples, "total": bounded})
        run = self.run
        if run is None:
            run = uuid.uuid4().hex
            records.append({"kind": "run", "run": run, "accountant": self._accountant.mechanism()})
        if self._brought:
            records.append({"kind": "brought", "run": run, "history": as_json(self._brought)})
        now = as_charge((sigma, rate, 1))
        [[_, kept, _]] = as_json([now])
        records.append({"kind": "charge", "run": run, "sigma": float(sigma), "rate": kept})
        self._file.append(*records)
        self.run, self.spent.is_new = run, False
        own = self.spent.runs.setdefault(run, [])
        for entry in [*self._brought, now]:
            add_charge(own, *entry)
        self._brought = []
        _runs[self._accountant] = self.spent.path, run
        if self._safe is not None:
            self._safe = (self._safe[0], self._safe[1] - 1)

    def check_one_more(self, sigma: float, rate: Rate) -> None:
        """Refuse a release that would bring all runs above the total.

        Raises:
            BudgetExhaustedError: it would.
        """
        total, kind = self.spent.total, (sigma, rate)
        if total is None:
            return
        if self._safe is not None and self._safe[0] == kind and self._safe[1] > 0:
            return
        # Some are looked at together, twice as many every time: an accountant takes long.
        self._pace = self._pace * 2 if self._safe is not None and self._safe[0] == kind else 1
        while not self._fit(sigma, rate, self._pace):
            if self._pace == 1:
                raise BudgetExhaustedError(
                    f"all runs in the ledger {self.spent.path} may spend epsilon={total.epsilon:g} at delta={total.delta:g} "
                    "together, and one more step would be above; nothing was changed by this call."
                )
            self._pace = self._pace // 2
        self._safe = (kind, self._pace)

    def _fit(self, sigma: float, rate: Rate, steps: int) -> bool:
        total = self.spent.total
        assert total is not None
        history = [*self.spent.history, *self._brought, (sigma, rate, steps)]
        return total_epsilon(self._accountant, history, total.delta) <= total.epsilon

    def check_plan(self, planned: History) -> None:
        """Refuse a run whose ``planned`` releases do not fit into the total.

        Raises:
            BudgetExhaustedError: they do not.
        """
        total = self.spent.total
        if total is None or not planned:
            return
        history = [*self.spent.history, *self._brought]
        whole = total_epsilon(self._accountant, [*history, *planned], total.delta)
        if whole > total.epsilon:
            spent = total_epsilon(self._accountant, history, total.delta)
            raise BudgetExhaustedError(
                f"all runs in the ledger {self.spent.path} may spend epsilon={total.epsilon:g} at delta={total.delta:g}. They "
                f"have spent {spent:.4g}; with what this run plans it would be {whole:.4g}. Plan a smaller run."
            )


def total_epsilon(accountant: IAccountant, history: Iterable[Charge], delta: float) -> float:
    """Epsilon of ``history`` by an accountant of the same kind; by "pld" where that is the user's own, or no bound."""
    known = accountant.mechanism() in ACCOUNTANTS and accountant.mechanism() != "gdp"
    return epsilon_for(accountant if known else make_accountant("pld"), list(history), delta)
