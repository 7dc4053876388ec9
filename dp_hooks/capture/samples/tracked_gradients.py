"""Per-sample gradients of what a model computed from parameters alone before it met the batch."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..._rerun import autocast_as
from ..._tree import join, tensors_of
from ...gradients.terms import Sums, Term
from ...rules import sum_of_squares
from .axis import SampleAxis
from .tracked_value import TrackedValue

_HALVES = (torch.float16, torch.bfloat16)
_FAILS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


def sum_to(grads: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum ``[n, *expanded]`` to ``[n, *shape]``: the adjoint of broadcasting or repeating ``shape`` to ``expanded``."""
    n, expanded = grads.shape[0], grads.shape[1:]
    padded = (1,) * (len(expanded) - len(shape)) + tuple(shape)
    split, summed = [n], []
    for size, own in zip(expanded, padded, strict=True):
        summed.append(len(split))
        split += [size // own if own else 1, own]
    wide = grads.reshape(split)
    over = [d for d in summed if split[d] != 1]
    return (wide.sum(over) if over else wide).reshape((n, *shape))


@dataclass(eq=False)
class TrackedGradients(Term):
    """A term: ``rows`` ``[n, *value.shape]`` are the per-sample gradients of a tensor that all samples share."""

    tracked: TrackedValue
    rows: Tensor
    scale: float
    name: str

    def __post_init__(self) -> None:
        """It adds to the parameters behind the shared tensor."""
        self.samples, self.params = self.rows.shape[0], [root.param for root in self.tracked.roots]

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """Per-sample gradients of ``param`` for the chosen samples."""
        return self.tracked.scaled_rows_to_parameter(param, self.rows[rows], self.scale)

    def sq_norms(self, params: Sequence[nn.Parameter]) -> Sums | None:
        """Squared norms of the rows as they are, where the shared tensor is the parameter, or rearranges it."""
        if not (self.tracked.is_parameter or self.tracked.keeps_norm):
            return None
        return {param: sum_of_squares(self.rows) * self.scale**2 for param in params}

    def weighted_sums(self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None) -> Sums | None:
        """Weight the rows first: one pass back to the parameter instead of one per sample."""
        chosen = slice(None) if rows is None else rows
        if self.samples == 0 or self.tracked.custom:
            return None
        dtype = torch.promote_types(self.rows.dtype, torch.float32)
        total = torch.tensordot(factors[chosen].to(dtype) * self.scale, self.rows[chosen].to(dtype), dims=1)
        return {param: self.tracked.to_parameter(param, total) for param in params}


@dataclass(eq=False)
class BatchedOp:
    """One operation ``function(shared tensors, batched tensors, ...)`` in which parameters met the batch."""

    function: Callable[..., Any]
    skeleton: Any
    tracked: dict[int, TrackedValue]
    sample_axes: dict[int, SampleAxis | None]
    outputs: list[SampleAxis]
    name: str
    autocast: torch.dtype | None

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Repeat the operation on other tensors."""
        args, kwargs = join(self.skeleton, tensors)
        with autocast_as(tensors[0].device.type, self.autocast):
            out = self.function(*args, **kwargs)
        return [t for t in tensors_of(out) if t.is_floating_point() or t.is_complex()]


def _contraction(outputs: list[Tensor], grads: list[Tensor | None]) -> Tensor:
    if any(grad is not None and grad.shape != out.shape for out, grad in zip(outputs, grads, strict=True)):
        raise RuntimeError("the repeated operation gave tensors of other shapes than the first one")
    terms = [(out * grad.to(out.dtype)).sum() for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    return torch.stack(terms).sum()


@dataclass(eq=False)
class BatchedOpGradients(Term):
    """A term: the inputs and output gradients of one operation, from which gradients are worked out when asked for."""

    op: BatchedOp
    plain: dict[int, Tensor]
    output_grads: list[Tensor | None]
    samples: int
    scale: float
    how: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """It adds to the parameters behind the shared tensors of the operation."""
        self.name = self.op.name
        self.params = list({id(r.param): r.param for s in self.op.tracked.values() for r in s.roots}.values())

    def _all(self, values: dict[int, Tensor], plain: dict[int, Tensor]) -> list[Tensor]:
        return [values[i] if i in values else plain[i] for i in range(len(values) + len(plain))]

    def _rows(self, rows: slice | Tensor) -> dict[int, Tensor]:
        """Per-sample gradients of the shared tensors."""
        m = self.op
        values = {i: s.value.detach() for i, s in m.tracked.items()}
        if self.samples == 0:
            return {i: v.new_zeros((0, *v.shape)) for i, v in values.items()}
        if self.how.get("way") != "masked":
            try:
                found = self._by_vmap(values, rows)
                if "way" not in self.how and not self._adds_up(values, found, rows):
                    raise RuntimeError("samples cannot be cut out of this operation")
                self.how["way"] = "vmap"
                return found
            except _FAILS:
                self.how["way"] = "masked"
        return self._by_masks(values, rows)

    def _by_vmap(self, values: dict[int, Tensor], rows: slice | Tensor) -> dict[int, Tensor]:
        m, n = self.op, self.samples
        fixed = {i: t for i, t in self.plain.items() if m.sample_axes.get(i) is None}
        moving = {i: m.sample_axes[i].samples(t, n)[rows] for i, t in self.plain.items() if i not in fixed}  # type: ignore[union-attr]
        grads = [
            None if g is None else sample_axis.samples(g, n)[rows]
            for g, sample_axis in zip(self.output_grads, m.outputs, strict=True)
        ]
        present = [g for g in grads if g is not None]

        def loss(values: dict[int, Tensor], moving: dict[int, Tensor], present: list[Tensor]) -> Tensor:
            queue = iter(present)
            out = m.run(self._all(values, {**fixed, **moving}))
            return _contraction(out, [None if g is None else next(queue) for g in grads])

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="error")
            return dict(mapped(values, moving, present))

    def _vjp(self, values: dict[int, Tensor], grads: list[Tensor | None]) -> dict[int, Tensor]:
        with torch.enable_grad():
            leaves = {i: v.detach().requires_grad_() for i, v in values.items()}
            total = _contraction(self.op.run(self._all(leaves, self.plain)), grads)
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {
            i: torch.zeros_like(v) if g is None else g.to_dense() if g.is_sparse else g
            for (i, v), g in zip(leaves.items(), found, strict=True)
        }

    def _scaled(self, factors: Tensor) -> list[Tensor | None]:
        """The output gradients with the rows of sample ``i`` times ``factors[i]``."""
        out: list[Tensor | None] = []
        for g, sample_axis in zip(self.output_grads, self.op.outputs, strict=True):
            if g is None:
                out.append(None)
                continue
            sizes = sample_axis.factors(g.shape[sample_axis.axis], self.samples)
            assert sizes is not None
            weights = factors.to(g.dtype).repeat_interleave(sizes[1]).repeat(sizes[0])
            shape = [1] * g.dim()
            shape[sample_axis.axis] = -1
            rows = weights.reshape(shape)
            out.append((g * rows).masked_fill(rows == 0, 0))
        return out

    def _adds_up(self, values: dict[int, Tensor], found: dict[int, Tensor], rows: slice | Tensor) -> bool:
        """Whether the gradients of the samples add up to that of the whole operation."""
        present = next(g for g in self.output_grads if g is not None)
        factors = torch.zeros(self.samples, device=present.device, dtype=present.dtype)
        factors[rows] = 1
        whole = self._vjp(values, self._scaled(factors))
        for i, v in whole.items():
            total = found[i].sum(0)
            if not bool(torch.isfinite(v).all()):
                continue
            tolerance = 1e-6 if v.dtype == torch.float64 else 1e-2
            if float((total - v).norm()) > tolerance * (float(found[i].norm()) + 1e-30):
                return False
        return True

    def _by_masks(self, values: dict[int, Tensor], rows: slice | Tensor) -> dict[int, Tensor]:
        """Differentiate the whole operation once per sample, with the output gradients of the others set to zero."""
        device = next(iter(values.values())).device
        chosen = torch.arange(self.samples, device=device)[rows]
        parts = []
        for i in chosen.tolist():
            factors = torch.zeros(self.samples, device=device)
            factors[i] = 1
            parts.append(self._vjp(values, self._scaled(factors)))
        if not parts:
            return {i: v.new_zeros((0, *v.shape)) for i, v in values.items()}
        return {i: torch.stack([part[i] for part in parts]) for i in values}

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """Per-sample gradients of ``param`` for the chosen samples, all the shared tensors behind which it is added up."""
        found = self._rows(rows)
        total = None
        for i, shared in self.op.tracked.items():
            if any(root.param is param for root in shared.roots):
                part = shared.scaled_rows_to_parameter(param, found[i], self.scale)
                total = part if total is None else total + part
        assert total is not None
        return total

    def weighted_sums(self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None) -> Sums | None:
        """Weight the output gradients: one ordinary backward pass through the operation."""
        tensors = [*self.output_grads, *self.plain.values(), *(s.value for s in self.op.tracked.values())]
        halves = any(t is not None and t.dtype in _HALVES for t in tensors) or self.op.autocast is not None
        custom = any(s.custom for s in self.op.tracked.values())
        if self.samples == 0 or custom or halves:  # autograd would round the sum over samples before the noise is in
            return None
        weights = factors
        if rows is not None:
            weights = torch.zeros_like(factors)
            weights[rows] = factors[rows]
        values = {i: s.value.detach() for i, s in self.op.tracked.items()}
        found = self._vjp(values, self._scaled(weights * self.scale))
        out: dict[nn.Parameter, Tensor] = {}
        for param in params:
            parts = [
                shared.to_parameter(param, found[i])
                for i, shared in self.op.tracked.items()
                if any(root.param is param for root in shared.roots)
            ]
            out[param] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return out
