"""What the lines of a ledger say: of which dataset it is, and what every run was charged with."""

from dataclasses import dataclass
from pathlib import Path

from ...errors import AccountingError
from .history import History, add_charge, as_charge, as_number
from .ledger_file import Record

FORMAT = "dp_hooks ledger 1"


@dataclass(frozen=True)
class Total:
    """What all runs together may spend: ``epsilon`` at ``delta``."""

    epsilon: float
    delta: float


class Spent:
    """What the lines of a ledger say.

    Attributes:
        path: of the file.
        examples: number of examples in the dataset.
        total: what all runs together may spend, or None.
        runs: what each was charged with.
        is_new: whether there is nothing in the file.
    """

    def __init__(self, path: Path, records: list[Record], examples: int, total: Total | None = None) -> None:
        """Read ``records``; of an empty file ``examples`` and ``total`` are as given."""
        self.path, self.is_new = path, not records
        self.examples, self.total = examples, total
        self.runs: dict[str, History] = {}
        for number, record in enumerate(records, start=1):
            try:
                self._read(record, first=number == 1)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise AccountingError(
                    f"line {number} of {path} is none of a ledger in the format {FORMAT!r} ({type(error).__name__}: {error})."
                ) from error

    def _read(self, record: Record, *, first: bool) -> None:
        kind = record["kind"]
        if first != (kind == "ledger"):
            raise ValueError(f"kind {kind!r}")
        if kind == "ledger":
            if record["format"] != FORMAT or not isinstance(record["examples"], int):
                raise ValueError(f"format {record['format']!r}")
            self.examples = record["examples"]
            self.total = None if record["total"] is None else Total(*map(as_number, record["total"]))
        elif kind == "run":
            if record["run"] in self.runs or not isinstance(record["run"], str):
                raise ValueError(f"run {record['run']!r}")
            self.runs[record["run"]] = []
        elif kind == "brought":
            for entry in record["history"]:
                add_charge(self.runs[record["run"]], *as_charge(entry))
        elif kind == "charge":
            add_charge(self.runs[record["run"]], *as_charge((record["sigma"], record["rate"], 1)))
        else:
            raise ValueError(f"kind {kind!r}")

    @property
    def history(self) -> History:
        """What all runs were charged with."""
        return [entry for history in self.runs.values() for entry in history]
