"""What a private run can promise, in words and numbers."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .accounting.history import Charge
from .plots import plot_spending

RELATION = "one example, replaced by a null record (fixed-size add/remove)"
BY_ORDER = "order of the loader: one full-rate release charged per pass; no guarantee under plain add/remove"
NOT_COVERED = (
    "validation, early stopping and hyper-parameter choice on private data",
    "anything computed from private data outside the loss of the private steps (normalisation, vocabularies)",
    "mixing examples before the train function sees them (mixup in collate_fn): one example is then in two rows",
    "the secrecy of the random numbers: ordinary pseudo-random generators, floating-point noise",
)
_SECURE = "what the clipped sum loses by rounding while it is added up in floats, and how long steps take"


def not_covered(*, secure: bool) -> tuple[str, ...]:
    """Return what epsilon says nothing about; ``secure`` noise and sampling keep their random numbers secret."""
    return (*NOT_COVERED[:-1], _SECURE) if secure else NOT_COVERED


def relation_of(unit: str) -> str:
    """Return who is protected where that are units of several examples, by the name of the field that tells them."""
    which = f" ({unit})" if unit else ""
    return f"one unit{which} with all of its examples, replaced by a null record (fixed-size add/remove)"


@dataclass(frozen=True)
class PrivacyReport:
    """The state of a private scope; ``print(report)`` shows a table, ``report.as_dict()`` is for logs.

    ``history`` is what the accountant was charged with: (noise multiplier, rate, steps), one after the other; a rate is a number,
    or, for other samplings than Poisson's, a tuple that begins with the name. ``units`` and the like are None where the unit of
    privacy is one example.
    ``nonprivate_statistics`` is None, or, with that option, exact numbers of private samples, which epsilon does not cover.
    """

    epsilon: float
    delta: float
    accountant: str
    sampling: str
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: Any
    sensitivity: float
    clipping: str
    steps: int
    expected_batch_size: float
    dataset_size: int
    foreign_steps: int
    loss_verified: bool
    grad_sample_mode: str
    epsilon_remark: str = ""
    model_verified: bool = False
    collate: str = ""
    written_steps: int = 0
    random_numbers: str = "not known"
    relation: str = RELATION
    not_covered: tuple[str, ...] = NOT_COVERED
    clipping_details: dict[str, float] = field(default_factory=dict)
    history: tuple[Charge, ...] = ()
    target_epsilon: float | None = None
    target_delta: float | None = None
    nonprivate_statistics: dict[str, Any] | None = None
    units: int | None = None
    max_examples_per_unit: int | None = None
    expected_units: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a plain dictionary."""
        return asdict(self)

    def as_json(self, indent: int | None = None) -> str:
        """Return all fields as strict JSON: an infinite number is the string "infinity", and NaN is null.

        Args:
            indent: spaces by which lines are indented; None: all in one line.
        """
        return json.dumps(_strict(self.as_dict()), indent=indent, allow_nan=False)

    def as_markdown(self) -> str:
        """Return the lines of the report as a table in Markdown."""
        cells = [(name.replace("|", "\\|"), value.replace("|", "\\|")) for name, value in self._lines()]
        return "\n".join(["| privacy report | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw epsilon against private steps, with the budget as a line, if there is one at this delta; needs matplotlib.

        The last point is ``epsilon``; those on the way are worked out from ``history``, which takes some seconds for "prv".

        Args:
            path: the file to write; its ending says the format (``.png``, ``.pdf``, ``.svg``).

        Raises:
            InvalidArgumentError: epsilon is infinite, or the accountant is not one of Opacus's.
            DPHooksError: matplotlib is not installed.
        """
        plot_spending(
            path,
            self.history,
            self.delta,
            self.accountant,
            spent=self.epsilon,
            target_epsilon=self.target_epsilon if self.target_delta == self.delta else None,
            what="private steps" if sum(steps for *_, steps in self.history) == self.steps else "releases charged",
        )

    def __str__(self) -> str:
        """Lay the fields out as a table."""
        rows = self._lines()
        width = max(len(name) for name, _ in rows)
        return "\n".join(["Privacy report", *(f"  {name:<{width}}  {value}" for name, value in rows)])

    def _lines(self) -> list[tuple[str, str]]:
        epsilon = "infinite (a step without noise)" if math.isinf(self.epsilon) else f"{self.epsilon:.4f}"
        rows = [
            ("epsilon", epsilon),
            ("delta", f"{self.delta:g}"),
            ("accountant", f"{self.accountant} ({self.epsilon_remark})" if self.epsilon_remark else self.accountant),
            ("unit and relation", self.relation),
            ("sampling", self.sampling),
            ("sample rate q", f"{self.sample_rate:g}"),
            ("noise multiplier", f"{self.noise_multiplier:.6g}"),
            ("random numbers", self.random_numbers),
            ("clipping", f"{self.clipping}, C = {self.max_grad_norm}, sensitivity {self.sensitivity:g}"),
            ("private steps", str(self.steps)),
            ("dataset, batch", f"{self.dataset_size} examples, {self.expected_batch_size:g} expected per batch"),
            ("gradients", f'mode "{self.grad_sample_mode}"'),
            ("model", "verified" if self.model_verified else "not checked as a whole (parts only, or no step yet)"),
            ("collate", f"not verified: {self.collate}" if self.collate else "verified: a row is made of one example"),
            ("loss", "verified" if self.loss_verified else "not checked (pass criterion=..., or train with @dp_step)"),
        ]
        if self.clipping_details:
            details = ", ".join(f"{name} {value:.6g}" for name, value in self.clipping_details.items())
            rows.insert([name for name, _ in rows].index("clipping") + 1, ("", details))
        if self.units is not None:
            most = "all" if self.max_examples_per_unit is None else f"at most {self.max_examples_per_unit}"
            units = f"{self.units} units, {self.expected_units:.4g} expected per batch, with {most} of the examples of each"
            rows.insert([name for name, _ in rows].index("dataset, batch") + 1, ("units", units))
        if self.foreign_steps:
            rows.append(("outside the loader", f"{self.foreign_steps} steps, charged without amplification"))
        if self.written_steps:
            rows.append(("written to", f"parameters, by something else, before {self.written_steps} of the steps: not covered"))
        if self.nonprivate_statistics is not None:
            rows.append(("not private", _of_last_step(self.nonprivate_statistics)))
        return rows + [("not covered" if i == 0 else "", what) for i, what in enumerate(self.not_covered)]


def _of_last_step(statistics: Mapping[str, Any]) -> str:
    last = statistics["last"]
    if not last:
        return "statistics of private samples are kept; no step yet"
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in last.items())
    return f"of the last step: {numbers}. {statistics['remark'].capitalize()}"


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    return value
