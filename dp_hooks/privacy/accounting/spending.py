"""budget: what all runs on a dataset have spent together, from their ledger."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..._validate import bad, fraction
from .history import History
from .ledger_contents import Spent
from .ledger_file import read_records
from .opacus import DELTA, asked
from .open_ledger import total_epsilon


@dataclass(frozen=True)
class RunSpending:
    """What one run has spent: its name in the ledger, its releases, and their epsilon."""

    run: str
    releases: int
    epsilon: float


@dataclass(frozen=True)
class Spending:
    """What all runs in a ledger have spent; ``print`` shows a table, ``as_dict()`` is plain numbers.

    Attributes:
        path: of the ledger.
        examples: number of examples in the dataset.
        epsilon: of all runs together, at ``delta``.
        delta: the delta of all epsilons here.
        accountant: what worked them out.
        runs: each run by itself; epsilons of runs do not add up to ``epsilon``, which is less than their sum.
        total_epsilon: what all runs may spend together at ``total_delta``; None: nothing was set.
        total_delta: the delta of that.
        unfinished: whether a line at the end was left out that a process was writing when it ended; nothing of it was released.
    """

    path: str
    examples: int
    epsilon: float
    delta: float
    accountant: str
    runs: tuple[RunSpending, ...]
    total_epsilon: float | None
    total_delta: float | None
    unfinished: bool

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a plain dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        """Lay the runs out as a table."""
        rows = [("run", "releases", f"epsilon at delta = {self.delta:g}")]
        rows += [(run.run[:12], str(run.releases), f"{run.epsilon:.4f}") for run in self.runs]
        rows.append(("together", str(sum(run.releases for run in self.runs)), f"{self.epsilon:.4f}"))
        widths = [max(len(row[k]) for row in rows) for k in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows]
        head = f"Ledger {self.path}: {self.examples} examples, accountant {self.accountant}"
        if self.total_epsilon is not None:
            lines.append(f"may spend together: epsilon = {self.total_epsilon:g} at delta = {self.total_delta:g}")
        if self.unfinished:
            lines.append("(the last line was not finished when its process ended: nothing of it was released)")
        return "\n".join([head, *(f"  {line}" for line in lines)])


def budget(path: str | os.PathLike[str], *, delta: float | None = None, accountant: str = "pld") -> Spending:
    """Return what all runs in the ledger at ``path`` have spent; nothing is changed, and a run may be writing to it.

    Args:
        path: the file that was given to scopes as ``ledger=``.
        delta: default: that of the ledger's total if it has one, else the smaller of 1e-5 and a tenth of 1 / (dataset size).
        accountant: what works epsilon out: "pld", "prv" or "rdp".

    Raises:
        AccountingError: the file is damaged, or no ledger.
        InvalidArgumentError: there is no such file, or ``delta`` or ``accountant`` cannot be used.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        raise bad("path", path, "pass the path of a ledger: a file that was given to a scope as ledger=.")
    records, unfinished = read_records(Path(path))
    spent = Spent(Path(path), records, examples=0)
    if delta is None:
        delta = spent.total.delta if spent.total is not None else min(1e-5, 0.1 / max(1, spent.examples))
    delta, counts = fraction("delta", delta, DELTA), asked(accountant)

    def epsilon(history: History) -> float:
        return total_epsilon(counts, history, delta)

    runs = (RunSpending(name, sum(steps for _, _, steps in own), epsilon(own)) for name, own in spent.runs.items())
    return Spending(
        path=str(path),
        examples=spent.examples,
        epsilon=epsilon(spent.history),
        delta=delta,
        accountant=accountant,
        runs=tuple(runs),
        total_epsilon=None if spent.total is None else spent.total.epsilon,
        total_delta=None if spent.total is None else spent.total.delta,
        unfinished=unfinished,
    )
