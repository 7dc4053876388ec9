"""Operations in which tracked tensors meet the batch: from there on every sample has a row of its own."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._operations import BROADCASTS, DROPOUT_ARGUMENTS, EXPANSIONS, MATRIX_PRODUCTS
from ..._rerun import autocast_dtype
from ..._tree import join, split, tensors_of
from ..calls.gradient_tap import Grads, Make, tap
from ..calls.session import Session
from .axis import SampleAxis
from .rows_of_inputs import counted_otherwise
from .tracked import TrackedTensor, is_float, on_values, works_in_place
from .tracked_gradients import BatchedOp, BatchedOpGradients, TrackedGradients, sum_to
from .tracked_value import TrackedParameter, TrackedValue, names_of, refused
from .uses import UseLayout, guessed


@dataclass(eq=False)
class BatchedUse:
    """One use of tracked tensors together with tensors of the batch: it is run, and what comes back to it watched."""

    session: Session  # takes what comes back
    func: Any  # the torch function
    name: str  # its name without underscores
    layout: UseLayout  # where the samples are in the tensors that are not tracked
    skeleton: Any  # its arguments without the tensors
    tensors: list[Tensor]  # the tensors among them
    how: dict[str, str]  # whether samples can be cut out of the operation, kept from use to use
    _tracked: dict[int, TrackedTensor] = field(init=False)
    _roots: list[TrackedParameter] = field(init=False)
    _rows: int | None = field(init=False)

    def __post_init__(self) -> None:
        self._tracked = {i: t for i, t in enumerate(self.tensors) if isinstance(t, TrackedTensor)}
        self._roots = [root for t in self._tracked.values() for root in t.content.roots]
        self._rows = self.session.call.rows

    def run(self) -> Any:
        """Expand shared operands first where that does, else keep the operation as a whole."""
        if self.layout.reason is None:
            if self.name == "setitem":
                return self._set_rows()
            out = self._expand_first()
            if out is not None:
                return out
        if works_in_place(self.func) or self.skeleton[1].get("out") is not None:  # the result may never be looked at
            raise refused(self._roots, f"{self.func.__name__} writes it into a tensor in place")
        return self._record()

    def _expand_first(self) -> Any | None:
        """Give the shared operands one row per sample before the operation; autograd does the rest. None: that is not possible."""
        n, wide = self._rows, list(self.tensors)
        with torch._C.DisableTorchFunctionSubclass():
            shape = self._broadcast_shape()
            at = None if shape is None else self._broadcast_axis(shape)
            if n is None or shape is None or at is None or at.factors(shape[at.axis], n) is None:
                return None
            for i, t in self._tracked.items():
                value = t.content.value.detach()
                own = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
                if len(own) != len(shape) or own[at.axis] != 1:
                    return None
                wide[i] = value.reshape(own).expand(*own[: at.axis], shape[at.axis], *own[at.axis + 1 :])
            dtype = None
            if all(t.dim() == 0 for t in self._tracked.values()):  # numbers leave the precision of the others as it is
                other = next((t for t in self.tensors if not isinstance(t, TrackedTensor) and is_float(t)), None)
                numbers = [t.content.value for t in self._tracked.values()]
                dtype = (
                    None if other is None else functools.reduce(torch.promote_types, (torch.result_type(v, other) for v in numbers))
                )
        for i, t in self._tracked.items():
            wide[i] = self._one_row_per_sample(wide[i], t.content, at, n)
            wide[i] = wide[i] if dtype is None else wide[i].to(dtype)
        args, kwargs = join(self.skeleton, wide)
        return self.func(*args, **kwargs)

    def _broadcast_shape(self) -> tuple[int, ...] | None:
        """The shape that operands are broadcast to, matrices in it ``[1, 1]``; None: they are not broadcast."""
        tensors, tracked = self.tensors, self._tracked
        if self.name == "scaled_dot_product_attention" and min(tracked) >= 3:
            return (*tensors[0].shape[:-1], tensors[1].shape[-2])
        if self.name in MATRIX_PRODUCTS and all(t.dim() > (1 if i in tracked else 2) for i, t in enumerate(tensors)):
            return (*torch.broadcast_shapes(*(t.shape[:-2] for t in tensors)), 1, 1)
        return tuple(torch.broadcast_shapes(*(t.shape for t in tensors))) if self.name in BROADCASTS else None

    def _broadcast_axis(self, shape: tuple[int, ...]) -> SampleAxis | None:
        """Where samples are in a result of this shape."""
        at = self.layout.outputs[0] if self.layout.outputs else None
        if at is None:
            others = [t for i, t in enumerate(self.tensors) if i not in self._tracked]
            moving = ((t, at) for t, at in zip(others, self.layout.inputs, strict=True) if at is not None)
            tensor, at = next(moving, (None, None))
            if tensor is not None and at is not None:
                at = SampleAxis(len(shape) - tensor.dim() + at.axis, at.outer, at.inner)
        last = len(shape) - 2 * (self.name in MATRIX_PRODUCTS)
        return at if at is not None and at.axis < last else None

    def _one_row_per_sample(self, expanded: Tensor, shared: TrackedValue, at: SampleAxis, n: int) -> Tensor:
        return self._watched(expanded, shared, n, lambda grad: sum_to(at.samples(grad, n), shared.value.shape))

    def _watched(self, wide: Tensor, shared: TrackedValue, n: int, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``wide``, made of ``shared``; ``rows`` gives the per-sample gradients of it from those of ``wide``."""
        session, name = self.session, names_of(shared.roots)

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            (grad,) = grads
            assert grad is not None
            return [TrackedGradients(shared, rows(grad), session.scale(n), name)]

        return tap(session, [wide], [], name, make)[0]

    def _set_rows(self) -> None:
        """``batched[index] = shared``: the same index on a tensor of sample numbers says whose rows were set."""
        (target, index, value), _ = join(self.skeleton, list(self.tensors))
        at, n = self.layout.inputs[0] if self.layout.inputs else None, self._rows
        lone = isinstance(value, TrackedTensor) and len(self._tracked) == 1
        if not lone or at is None or n is None or not at.fits(target, n):
            raise refused(self._roots, "it is written into a tensor in place")
        owner = at.spread(torch.arange(n, device=target.device), target).expand(target.shape)[index]
        shared = value.content
        own = tuple(shared.value.shape)
        with torch._C.DisableTorchFunctionSubclass():
            wide = shared.value.detach().expand(owner.shape)

        def rows(grad: Tensor) -> Tensor:
            found = [sum_to(grad.masked_fill(owner != i, 0)[None], own) for i in range(n)]
            return torch.cat([grad.new_zeros((0, *own)), *found])

        target[index] = self._watched(wide, shared, n, rows)

    def _record(self) -> Any:
        """Run the operation on detached values, and keep what its gradients per sample need."""
        n, layout, tracked = self._rows, self.layout, self._tracked
        out = on_values(self.func, self.skeleton, self.tensors)
        floats = [t for t in tensors_of(out) if is_float(t)]
        if not floats:
            return out
        outputs = layout.outputs
        if outputs is None and n is not None:
            outputs = tuple(guessed(t, self.session.axis, n) for t in floats)
        reason = layout.reason or self._reason(floats, outputs)
        if reason is not None:
            call = self.session.call
            hint = counted_otherwise(tensors_of((call.args, call.kwargs)), self.session.axis)
            error = refused(self._roots, reason + hint)

            def refuse(saved: list[Tensor], grads: Grads) -> list[Any]:
                raise error  # only if a gradient comes back: what is not trained on need not be told apart

            return self._tapped(out, [], refuse)
        assert n is not None
        assert outputs is not None
        positions = [i for i in range(len(self.tensors)) if i not in tracked]
        known = ((i, at) for i, at in zip(positions, layout.inputs, strict=True) if at is not None)
        sample_axes = {i: at for i, at in known if at.fits(self.tensors[i], n)}
        shared = {i: t.content for i, t in tracked.items()}
        first = outputs[0]
        expands = not positions and len(shared) == len(outputs) == 1 and self.name in EXPANSIONS
        if expands and first is not None and first.outer == 1:  # the adjoint of an expansion is a sum
            return self._one_row_per_sample(out, next(iter(shared.values())), first, n)
        with torch._C.DisableTorchFunctionSubclass():
            autocast = autocast_dtype(floats[0].device.type)
        axes = [at for at in outputs if at is not None]
        op = BatchedOp(self.func, self.skeleton, shared, sample_axes, axes, names_of(self._roots), autocast)
        scale, how = self.session.scale, self.how

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            plain = dict(zip(positions, saved, strict=True))
            return [BatchedOpGradients(op, plain, grads, n, scale(n), how)]

        return self._tapped(out, [self.tensors[i].detach() for i in positions], make)

    def _reason(self, floats: list[Tensor], outputs: Sequence[SampleAxis | None] | None) -> str | None:
        """Why the gradients of samples cannot be worked out from this operation, if they cannot."""
        n = self._rows
        if n is None or outputs is None or len(outputs) != len(floats):
            return f"{self.name} gave something else than foreseen"
        if any(at is None or not at.fits(t, n) for t, at in zip(floats, outputs, strict=True)):
            return f"{self.name} gave a result without rows for each sample"
        args, kwargs = self.skeleton
        probabilities = [kwargs.get(key) for key in DROPOUT_ARGUMENTS]
        if self.name == "scaled_dot_product_attention":
            probabilities += args[4:5]
        if any(isinstance(p, (int, float)) and p for p in probabilities):
            return f"{self.name} draws random numbers (set its dropout to 0)"
        if any(t is o for t in self.tensors for o in floats):
            return f"{self.name} works in place"
        return None

    def _tapped(self, out: Any, saved: list[Tensor], make: Make) -> Any:
        whole, made = split(out)
        floats = [t for t in made if is_float(t)]
        queue = iter(tap(self.session, floats, saved, names_of(self._roots), make))
        return join(whole, [next(queue) if is_float(t) else t for t in made])
