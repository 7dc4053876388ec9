"""Explanation: a table of what private training would do with each parameter of a model."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

STRATEGIES = {
    "ghost": "norms and sums from what was captured; no gradient per sample is written out",
    "instantiate": "the gradient of each sample is written out, by the rule for its module",
    "lifted": "the parameter is followed to where it meets the batch; each sample gets a row of its own there",
    "vmap": "no rule: the module is repeated under torch.func.vmap",
    "loop": "no rule: the module is repeated on one sample at a time",
    "unused": "the loss does not depend on it; it gets noise all the same",
    "refused": "see below",
    "unknown": "the model was refused before it got there",
}


@dataclass(frozen=True)
class ParameterRow:
    """How one trainable parameter would be treated.

    Attributes:
        name: its first name in the model.
        shape: its shape.
        module: the class of the module that owns it.
        rule: the rule that reads its gradients, "-" where no rule does; several uses by different rules are joined by "+".
        strategy: one of :data:`STRATEGIES`, several joined by "+".
        uses: in how many places it was used.
        multiplications: per sample, for its norm; None where that is not known (modules that are repeated).
        held: numbers held per sample after the backward pass; inputs and output gradients of a module count for each of
            its parameters.
    """

    name: str
    shape: tuple[int, ...]
    module: str
    rule: str
    strategy: str
    uses: int
    multiplications: int | None
    held: int


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` shows a table, ``as_dict()`` is for logs.

    Attributes:
        model: the class of the model.
        rows: one per trainable parameter, each once.
        refusals: why the model would be refused, with the remedies; empty if it would not.
        checked: whether per-sample gradients agreed with plain autograd on single samples.
        samples: number of samples in the example.
        training: whether the model was in training mode.
        frozen: number of parameters that are not trained.
        grad_sample_mode: the mode that was asked about.
    """

    model: str
    rows: tuple[ParameterRow, ...]
    refusals: tuple[str, ...]
    checked: bool
    samples: int
    training: bool
    frozen: int
    grad_sample_mode: str

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the parameters that the loss does not depend on."""
        return tuple(row.name for row in self.rows if row.strategy == "unused")

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a plain dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        """Lay the rows out as a table, and say below what would be refused."""
        numbers = sum(torch.Size(row.shape).numel() for row in self.rows)
        lines = [
            f'{self.model} in {"training" if self.training else "eval"} mode, grad_sample_mode="{self.grad_sample_mode}", '
            f"example of {self.samples} samples",
            f"{len(self.rows)} trainable parameters ({numbers:,} numbers), {self.frozen} frozen",
        ]
        lines += _table(self.rows)
        used = {name for row in self.rows for name in row.strategy.split("+")}
        lines += [f"  {name}: {text}" for name, text in STRATEGIES.items() if name in used]
        if self.unused:
            lines.append(f"unused: {', '.join(self.unused)}. Freeze them with requires_grad_(False) to spare the noise.")
        lines.append(f"checked against single-sample autograd: {'yes' if self.checked else 'no'}")
        if self.refusals:
            lines.append(f"would be refused, for {len(self.refusals)} reason(s):")
            lines += [f"  - {text}" for text in self.refusals]
        else:
            lines.append("nothing would be refused")
        return "\n".join(lines)


def _table(rows: tuple[ParameterRow, ...]) -> list[str]:
    head = ("parameter", "shape", "module", "rule", "strategy", "mult./sample", "held/sample")
    cells = [head] + [
        (
            row.name,
            "x".join(map(str, row.shape)) or "scalar",
            row.module,
            row.rule,
            row.strategy + (f" ({row.uses} uses)" if row.uses > 1 else ""),
            "-" if row.multiplications is None else f"{row.multiplications:,}",
            f"{row.held:,}",
        )
        for row in rows
    ]
    width = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return [
        "  ".join(cell.rjust(w) if i > 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, width, strict=True)))
        for line in cells
    ]
