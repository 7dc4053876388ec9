"""Per-sample gradients of what a model computed from parameters alone before it met the batch."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..._precision import wide_dtype
from ..._rerun import autocast_as
from ..._tree import join
from ...gradients.terms import Sums, Term
from ...rules import sum_of_squares
from ...rules.generic import contraction, gradients_of
from .axis import SampleAxis
from .tracked_value import FAILS, TrackedValue

_HALVES = (torch.float16, torch.bfloat16)


def sum_to(grads: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum ``[n, *expanded]`` to ``[n, *shape]``: the adjoint of broadcasting or repeating ``shape`` to ``expanded``."""
    n, expanded = grads.shape[0], grads.shape[1:]
    split = [n]
    for size, own in zip(expanded, (1,) * (len(expanded) - len(shape)) + tuple(shape), strict=True):
        split += [size // own if own else 1, own]
    wide = grads.reshape(split)
    over = [d for d in range(1, len(split), 2) if split[d] != 1]
    return (wide.sum(over) if over else wide).reshape((n, *shape))


@dataclass(eq=False)
class TrackedGradients(Term):
    """A term: ``rows`` ``[n, *value.shape]`` are the per-sample gradients of a tensor that all samples share."""

    tracked: TrackedValue
    rows: Tensor
    scale: float
    name: str

    def __post_init__(self) -> None:
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
        dtype = wide_dtype(self.rows.dtype)
        total = torch.tensordot(factors[chosen].to(dtype) * self.scale, self.rows[chosen].to(dtype), dims=1)
        return {param: self.tracked.to_parameter(param, total) for param in params}


@dataclass(eq=False)
class BatchedOp:
    """One operation ``function(shared tensors, batched tensors, ...)`` in which parameters met the batch."""

    function: Callable[..., Any]
    skeleton: Any
    tracked: dict[int, TrackedValue]
    sample_axes: dict[int, SampleAxis]
    outputs: list[SampleAxis]
    name: str
    autocast: torch.dtype | None

    def run(self, values: dict[int, Tensor], batched: dict[int, Tensor]) -> Any:
        """Repeat the operation on other tensors."""
        tensors = [values[i] if i in values else batched[i] for i in range(len(values) + len(batched))]
        args, kwargs = join(self.skeleton, tensors)
        with autocast_as(tensors[0].device.type, self.autocast):
            return self.function(*args, **kwargs)


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
        self.name = self.op.name
        self.params = list({id(r.param): r.param for s in self.op.tracked.values() for r in s.roots}.values())

    def _rows(self, rows: slice | Tensor) -> dict[int, Tensor]:
        """Per-sample gradients of the shared tensors."""
        values = {i: s.value.detach() for i, s in self.op.tracked.items()}
        if self.samples and self.how.get("way") != "masked":
            try:
                found = self._by_vmap(values, rows)
                if "way" not in self.how and not self._adds_up(values, found, rows):
                    raise RuntimeError("samples cannot be cut out of this operation")
                self.how["way"] = "vmap"
                return found
            except FAILS:
                self.how["way"] = "masked"
        # The whole operation once per sample, without the output gradients of the others.
        numbers = torch.arange(self.samples, device=next(iter(values.values())).device)
        finite = self._finite() if self.plain else numbers >= 0
        parts = [self._weighted(values, numbers == i, finite | (numbers == i)) for i in numbers[rows]]
        return {i: torch.stack([p[i] for p in parts]) if parts else v.new_zeros((0, *v.shape)) for i, v in values.items()}

    def _by_vmap(self, values: dict[int, Tensor], rows: slice | Tensor) -> dict[int, Tensor]:
        op, n = self.op, self.samples
        fixed = {i: t for i, t in self.plain.items() if i not in op.sample_axes}
        moving = {i: at.samples(self.plain[i], n)[rows] for i, at in op.sample_axes.items()}
        present = [at.samples(g, n)[rows] for g, at in zip(self.output_grads, op.outputs, strict=True) if g is not None]

        def loss(values: dict[int, Tensor], moving: dict[int, Tensor], present: list[Tensor]) -> Tensor:
            queue = iter(present)
            grads = [None if g is None else next(queue) for g in self.output_grads]
            return contraction(op.run(values, {**fixed, **moving}), grads)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="error")
            return dict(mapped(values, moving, present))

    def _finite(self) -> Tensor:
        """``[samples]``: whether all that the operation got of a sample is finite."""
        finite = torch.ones(self.samples, dtype=torch.bool, device=next(iter(self.plain.values())).device)
        for i, at in self.op.sample_axes.items():
            finite &= torch.isfinite(at.samples(self.plain[i], self.samples)).flatten(1).all(1)
        return finite

    def _weighted(self, values: dict[int, Tensor], factors: Tensor, keep: Tensor | None = None) -> dict[int, Tensor]:
        """Gradients of the shared tensors, those of sample ``i`` times ``factors[i]``: one pass through the whole operation.

        Samples that ``keep`` leaves out take part with zeros in the place of their inputs, which may not be finite.
        """
        plain = self.plain
        if keep is not None:
            plain = {**plain, **{i: _zeroed(plain[i], keep, at) for i, at in self.op.sample_axes.items()}}
        grads: list[Tensor | None] = []
        for g, at in zip(self.output_grads, self.op.outputs, strict=True):
            weights = None if g is None else at.spread(factors.to(g.dtype), g)
            grads.append(None if g is None or weights is None else (g * weights).masked_fill(weights == 0, 0))
        with torch.enable_grad():
            leaves = {i: v.detach().requires_grad_() for i, v in values.items()}
            return gradients_of(contraction(self.op.run(leaves, plain), grads), leaves)

    def _adds_up(self, values: dict[int, Tensor], found: dict[int, Tensor], rows: slice | Tensor) -> bool:
        """Whether the gradients of the samples add up to that of the whole operation."""
        present = next(g for g in self.output_grads if g is not None)
        factors = torch.zeros(self.samples, device=present.device, dtype=present.dtype)
        factors[rows] = 1
        for i, whole in self._weighted(values, factors).items():
            tolerance = 1e-6 if whole.dtype == torch.float64 else 1e-2
            error = float((found[i].sum(0) - whole).norm())
            if bool(torch.isfinite(whole).all()) and error > tolerance * (float(found[i].norm()) + 1e-30):
                return False
        return True

    def _added(
        self, param: nn.Parameter, found: dict[int, Tensor], back: Callable[[TrackedValue, nn.Parameter, Tensor], Tensor]
    ) -> Tensor:
        """Take what was ``found`` for the shared tensors back to ``param``, and add up over those that it is behind."""
        behind = [(i, s) for i, s in self.op.tracked.items() if any(root.param is param for root in s.roots)]
        return functools.reduce(torch.add, (back(shared, param, found[i]) for i, shared in behind))

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """Per-sample gradients of ``param`` for the chosen samples."""
        return self._added(param, self._rows(rows), lambda s, p, g: s.scaled_rows_to_parameter(p, g, self.scale))

    def weighted_sums(self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None) -> Sums | None:
        """Weight the output gradients: one ordinary backward pass through the operation."""
        tensors = [*self.output_grads, *self.plain.values(), *(s.value for s in self.op.tracked.values())]
        halves = any(t is not None and t.dtype in _HALVES for t in tensors) or self.op.autocast is not None
        custom = any(s.custom for s in self.op.tracked.values())
        if self.samples == 0 or custom or halves:  # autograd would round the sum over samples before the noise is in
            return None
        weights, keep = factors, None
        if rows is not None:
            weights, keep = torch.zeros_like(factors), torch.zeros_like(factors, dtype=torch.bool)
            weights[rows], keep[rows] = factors[rows], True
        values = {i: s.value.detach() for i, s in self.op.tracked.items()}
        found = self._weighted(values, weights * self.scale, keep)
        return {param: self._added(param, found, TrackedValue.to_parameter) for param in params}


def _zeroed(tensor: Tensor, keep: Tensor, at: SampleAxis) -> Tensor:
    """``tensor`` with zeros for the samples that are not kept."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.masked_fill(~at.spread(keep, tensor), 0)
