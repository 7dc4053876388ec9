"""Operations in which tracked tensors meet the batch: from there on every sample has a row of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._operations import BROADCASTS, DROPOUT_ARGUMENTS, EXPANSIONS, MATRIX_PRODUCTS
from ..._rerun import autocast_dtype
from ..._tree import join, split, tensors_of
from ..calls.gradient_tap import Grads, Make, tap
from ..calls.session import Session
from .axis import SampleAxis
from .tracked import TrackedTensor, is_float, on_values
from .tracked_gradients import BatchedOp, BatchedOpGradients, TrackedGradients, sum_to
from .tracked_value import TrackedParameter, TrackedValue, names_of, refused
from .uses import UseLayout, guessed


class BatchedOps:
    """Runs such operations, and watches what comes back to them."""

    def __init__(self, session: Session) -> None:
        """What comes back goes to ``session``."""
        self.session = session
        # Per use, whether samples can be cut out of the operation.
        self._ways: dict[Any, dict[str, str]] = {}

    def run(self, func: Any, name: str, key: Any, use: UseLayout, skeleton: Any, tensors: list[Tensor]) -> Any:
        """Run ``func`` as ``use`` says: expand shared operands first where that does, else keep the operation as a whole."""
        tracked = {i: t for i, t in enumerate(tensors) if isinstance(t, TrackedTensor)}
        roots = [root for t in tracked.values() for root in t.content.roots]
        if use.reason is not None:
            self._check_out_of_place(func, skeleton, roots)
            return self._refuse(func, skeleton, tensors, roots, use.reason)
        if name == "setitem":
            return self._set_rows(func, skeleton, tensors, tracked, use)
        expandable = name in BROADCASTS or (
            name in MATRIX_PRODUCTS and all(t.dim() > 2 for i, t in enumerate(tensors) if i not in tracked)
        )
        if name == "scaled_dot_product_attention" and set(tracked) <= set(range(3, len(tensors))):
            expandable = True
        if expandable:
            done, out = self._expand_first(func, name, use, skeleton, tensors, tracked)
            if done:
                return out
        self._check_out_of_place(func, skeleton, roots)
        return self._record_operation(func, name, key, use, skeleton, tensors, tracked, roots)

    def _check_out_of_place(self, func: Any, skeleton: Any, roots: list[TrackedParameter]) -> None:
        """Refuse at once where the result may never be looked at, since the target is."""
        name = getattr(func, "__name__", "")
        in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")
        if in_place or name == "__setitem__" or "out" in skeleton[1]:
            raise refused(roots, f"{name} writes it into a tensor in place")

    def _refuse(
        self, func: Any, skeleton: Any, tensors: list[Tensor], roots: list[TrackedParameter], reason: str
    ) -> Any:
        """Go on, and raise if a gradient comes back: what is not trained on need not be told apart."""
        error = refused(roots, reason)

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            raise error

        return self._tapped(on_values(func, skeleton, tensors), [], make, roots)

    def _tapped(self, out: Any, saved: list[Tensor], make: Make, roots: Sequence[TrackedParameter]) -> Any:
        whole, made = split(out)
        floats = [t for t in made if is_float(t)]
        if not floats:
            return out
        queue = iter(tap(self.session, floats, saved, names_of(roots), make))
        return join(whole, [next(queue) if is_float(t) else t for t in made])

    def _shape_of(self, name: str, use: UseLayout, tensors: list[Tensor]) -> tuple[tuple[int, ...], SampleAxis] | None:
        """Shape of the broadcast result, and where samples are in it."""
        if name == "scaled_dot_product_attention":
            q, k = tensors[0], tensors[1]
            shape: tuple[int, ...] = (*q.shape[:-1], k.shape[-2])
        elif name in MATRIX_PRODUCTS:
            batch = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
            shape = (*batch, 1, 1)
        else:
            shape = tuple(torch.broadcast_shapes(*(t.shape for t in tensors)))
        sample_axis = use.outputs[0] if use.outputs else None
        if sample_axis is None:
            moving = [
                (t, at)
                for t, at in zip([t for t in tensors if not isinstance(t, TrackedTensor)], use.inputs, strict=True)
                if at is not None
            ]
            if not moving:
                return None
            tensor, at = moving[0]
            sample_axis = SampleAxis(len(shape) - tensor.dim() + at.axis, at.outer, at.inner)
        if sample_axis.axis >= len(shape) or (name in MATRIX_PRODUCTS and sample_axis.axis >= len(shape) - 2):
            return None
        return (shape, sample_axis)

    def _expand_first(
        self,
        func: Any,
        name: str,
        use: UseLayout,
        skeleton: Any,
        tensors: list[Tensor],
        tracked: dict[int, TrackedTensor],
    ) -> tuple[bool, Any]:
        """Give the shared operands one row per sample before the operation; autograd does the rest."""
        with torch._C.DisableTorchFunctionSubclass():
            found = self._shape_of(name, use, tensors)
            n = self.session.call.rows
            if found is None or n is None or found[1].factors(found[0][found[1].axis], n) is None:
                return False, None
            shape, sample_axis = found
            wide: list[Tensor] = list(tensors)
            dtype = None
            if all(t.dim() == 0 for t in tracked.values()):
                moving = [t for t in tensors if not isinstance(t, TrackedTensor) and is_float(t)]
                dtype = moving[0].dtype if moving else None
            plans = []
            for i, t in tracked.items():
                value = t.content.value.detach()
                own = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
                if len(own) != len(shape) or own[sample_axis.axis] != 1:
                    return False, None
                target = list(own)
                target[sample_axis.axis] = shape[sample_axis.axis]
                wide[i] = value.reshape(own).expand(target)
                plans.append((i, t))
        for i, t in plans:
            wide[i] = self._one_row_per_sample(wide[i], t.content, sample_axis, n)
            if dtype is not None:
                wide[i] = wide[i].to(dtype)
        args, kwargs = join(skeleton, wide)
        return True, func(*args, **kwargs)

    def _one_row_per_sample(self, expanded: Tensor, shared: TrackedValue, sample_axis: SampleAxis, n: int) -> Tensor:
        name = names_of(shared.roots)

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            (grad,) = grads
            assert grad is not None
            shape = tuple(shared.value.shape)
            rows = grad.new_zeros((0, *shape)) if n == 0 else sum_to(sample_axis.samples(grad, n), shape)
            return [TrackedGradients(shared, rows, self.session.scale(n), name)]

        return tap(self.session, [expanded], [], name, make)[0]

    def _set_rows(
        self, func: Any, skeleton: Any, tensors: list[Tensor], tracked: dict[int, TrackedTensor], use: UseLayout
    ) -> Any:
        """``batched[index] = shared``: the same index on a tensor of sample numbers says whose rows were set."""
        (target, index, value), _ = join(skeleton, list(tensors))
        roots = [root for t in tracked.values() for root in t.content.roots]
        sample_axis = use.inputs[0] if use.inputs else None
        n = self.session.call.rows
        if (
            not isinstance(value, TrackedTensor)
            or len(tracked) != 1
            or isinstance(target, TrackedTensor)
            or not sample_axis
            or n is None
        ):
            return self._refuse_in_place(roots)
        sizes = sample_axis.factors(target.shape[sample_axis.axis], n)
        if sizes is None:
            return self._refuse_in_place(roots)
        numbers = torch.arange(n, device=target.device).repeat_interleave(sizes[1]).repeat(sizes[0])
        shape = [1] * target.dim()
        shape[sample_axis.axis] = -1
        owner = numbers.reshape(shape).expand(target.shape)[index]
        shared, name = value.content, names_of(roots)
        with torch._C.DisableTorchFunctionSubclass():
            wide = shared.value.detach().expand(owner.shape)

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            (grad,) = grads
            assert grad is not None
            own = tuple(shared.value.shape)
            rows = [grad.new_zeros((0, *own))]
            rows += [sum_to(grad.masked_fill(owner != i, 0)[None], own) for i in range(n)]
            return [TrackedGradients(shared, torch.cat(rows), self.session.scale(n), name)]

        target[index] = tap(self.session, [wide], [], name, make)[0]
        return None

    def _refuse_in_place(self, roots: list[TrackedParameter]) -> Any:
        raise refused(roots, "it is written into a tensor in place")

    def _record_operation(
        self,
        func: Any,
        name: str,
        key: Any,
        use: UseLayout,
        skeleton: Any,
        tensors: list[Tensor],
        tracked: dict[int, TrackedTensor],
        roots: list[TrackedParameter],
    ) -> Any:
        """Run the operation on detached values, and keep what its gradients per sample need."""
        out = on_values(func, skeleton, tensors)
        n = self.session.call.rows
        floats = [t for t in tensors_of(out) if is_float(t)]
        if not floats:
            return out
        outputs = use.outputs
        if outputs is None and n is not None:
            outputs = tuple(guessed(t, self.session.axis, n) for t in floats)
        reason = None
        if n is None or outputs is None or len(outputs) != len(floats):
            reason = f"{name} gave something else than foreseen"
        elif any(at is None or not at.fits(t, n) for t, at in zip(floats, outputs, strict=True)):
            reason = f"{name} gave a result without rows for each sample"
        elif any(float(value) for value in _probabilities(name, skeleton)):
            reason = f"{name} draws random numbers (set its dropout to 0)"
        elif any(t is o for t in tensors for o in floats):
            reason = f"{name} works in place"
        if reason is not None:
            error = refused(roots, reason)

            def refuse(saved: list[Tensor], grads: Grads) -> list[Any]:
                raise error

            return self._tapped(out, [], refuse, roots)
        assert n is not None
        assert outputs is not None
        positions = [i for i in range(len(tensors)) if i not in tracked]
        sample_axes = {
            i: at if at is not None and at.fits(tensors[i], n) else None
            for i, at in zip(positions, use.inputs, strict=True)
        }
        shared = {i: t.content for i, t in tracked.items()}
        with torch._C.DisableTorchFunctionSubclass():
            autocast = autocast_dtype(floats[0].device.type)
        op = BatchedOp(func, skeleton, shared, sample_axes, list(outputs), names_of(roots), autocast)  # type: ignore[arg-type]
        first = outputs[0]
        expands = not positions and len(shared) == len(outputs) == 1 and name in EXPANSIONS
        if expands and first is not None and first.outer == 1:  # the adjoint of an expansion is a sum
            return self._one_row_per_sample(out, next(iter(shared.values())), first, n)
        how = self._ways.setdefault(key, {})

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            plain = dict(zip(positions, saved, strict=True))
            return [BatchedOpGradients(op, plain, grads, n, self.session.scale(n), how)]

        return self._tapped(out, [tensors[i].detach() for i in positions], make, roots)


def _probabilities(name: str, skeleton: Any) -> list[float]:
    args, kwargs = skeleton
    found = [kwargs[key] for key in DROPOUT_ARGUMENTS if isinstance(kwargs.get(key), float)]
    if name == "scaled_dot_product_attention" and len(args) > 4:
        found.append(args[4])
    return found
