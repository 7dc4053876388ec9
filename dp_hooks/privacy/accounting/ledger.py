"""Ledger: what all runs on one dataset have spent, on disk, before anything of it is released."""

import os
from contextlib import ExitStack
from pathlib import Path

from opacus.accountants import IAccountant

from ..._validate import bad, fraction, positive
from ...errors import AccountingError
from .ledger_contents import Spent, Total
from .ledger_file import LedgerFile, Record, read_records
from .opacus import DELTA
from .open_ledger import OpenLedger


class Ledger:
    """A file with one line for each release of every run on one dataset, written and synced before the release.

    ::

        ledger = Ledger("reviews.jsonl", total_epsilon=10, total_delta=1e-5)
        with private_training(model, optimizer, loader, ..., ledger=ledger) as (opt, loader): ...
        print(dp_hooks.budget("reviews.jsonl"))

    Guarantee: whenever the process ends, what the file says was spent is no less than what was released, and at most one release
    more. A step that would bring all runs together above the total raises ``BudgetExhaustedError`` before it touches anything.
    Lines are bound to each other: one that is changed or missing is noticed, except at the end of the file, where that is what an
    interrupted write looks like. Whoever wants to forget what was spent can delete the file: keep it as the data are kept.

    Attributes:
        path: where it is.
        total: what all runs together may spend, if that is bounded.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, total_epsilon: float | None = None, total_delta: float | None = None
    ) -> None:
        """Name the file; it is read when a scope is made, and written to when that is entered.

        Args:
            path: the file, which is made if it is not there.
            total_epsilon: what all runs on the dataset may spend together, at ``total_delta``. Kept in a new file; of one that is
                there already it has to be what is in it, and need not be given.
            total_delta: the delta of that.
        """
        if not isinstance(path, (str, os.PathLike)) or not str(path):
            raise bad("ledger", path, "pass the path of a file, or a Ledger.")
        self.path = Path(path)
        if (total_epsilon is None) != (total_delta is None):
            raise bad("total_epsilon", total_epsilon, f"total_delta={total_delta!r} has to be given with it: {DELTA}")
        self.total: Total | None = None
        if total_epsilon is not None:
            self.total = Total(
                positive("total_epsilon", total_epsilon, "pass the epsilon of all runs together, greater than 0."),
                fraction("total_delta", total_delta, DELTA),
            )

    def spent(self, examples: int) -> Spent:
        """Return what is in the file, of a dataset of so many examples.

        Raises:
            AccountingError: it is damaged, or of something else.
            InvalidArgumentError: it has another total.
        """
        if not self.path.exists():
            return Spent(self.path, [], examples, self.total)
        return self._found(read_records(self.path)[0], examples)

    def _found(self, records: list[Record], examples: int) -> Spent:
        found = Spent(self.path, records, examples, self.total)
        if found.examples != examples:
            raise AccountingError(
                f"the ledger {self.path} is of a dataset of {found.examples} examples, and this one has {examples}. Every dataset "
                "needs a ledger of its own."
            )
        if self.total is not None and found.total != self.total:
            raise bad(
                "total_epsilon",
                self.total.epsilon,
                f"the ledger {self.path} was made with {found.total}, and what may be spent in all cannot be changed later.",
            )
        return found

    def open(self, stack: ExitStack, accountant: IAccountant, examples: int) -> OpenLedger:
        """Have the file for this scope alone, until ``stack`` unwinds.

        Raises:
            ScopeError: another scope has it.
            AccountingError, InvalidArgumentError: as :meth:`spent`.
        """
        file = LedgerFile(self.path)
        stack.callback(file.close)
        return OpenLedger(file, self._found(file.records, examples), accountant)


def as_ledger(ledger: object) -> Ledger | None:
    """Return the ledger that an argument names."""
    return ledger if isinstance(ledger, Ledger) or ledger is None else Ledger(ledger)  # type: ignore[arg-type]
