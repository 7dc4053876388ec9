"""What a private run can promise, in words and numbers."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

RELATION = "one example, replaced by a null record (fixed-size add/remove)"
BY_ORDER = "order of the loader: one full-rate release charged per pass; no guarantee under plain add/remove"
NOT_COVERED = (
    "validation, early stopping and hyper-parameter choice on private data",
    "anything computed from private data outside the loss of the private steps (normalisation, vocabularies)",
    "mixing examples before the train function sees them (mixup in collate_fn): one example is then in two rows",
    "the secrecy of the random numbers: ordinary pseudo-random generators, floating-point noise",
)


@dataclass(frozen=True)
class PrivacyReport:
    """The state of a private scope; ``print(report)`` shows a table, ``report.as_dict()`` is for logs."""

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
    relation: str = RELATION
    not_covered: tuple[str, ...] = NOT_COVERED
    clipping_details: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a plain dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        """Lay the fields out as a table."""
        epsilon = "infinite (a step without noise)" if math.isinf(self.epsilon) else f"{self.epsilon:.4f}"
        rows = [
            ("epsilon", epsilon),
            ("delta", f"{self.delta:g}"),
            ("accountant", f"{self.accountant} ({self.epsilon_remark})" if self.epsilon_remark else self.accountant),
            ("unit and relation", self.relation),
            ("sampling", self.sampling),
            ("sample rate q", f"{self.sample_rate:g}"),
            ("noise multiplier", f"{self.noise_multiplier:.6g}"),
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
        if self.foreign_steps:
            rows.append(("outside the loader", f"{self.foreign_steps} steps, charged without amplification"))
        if self.written_steps:
            rows.append(("written to", f"parameters, by something else, before {self.written_steps} of the steps: not covered"))
        rows += [("not covered" if i == 0 else "", what) for i, what in enumerate(self.not_covered)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(["Privacy report", *(f"  {name:<{width}}  {value}" for name, value in rows)])
