"""Parameters used outside a layer rule: they are followed until they meet the batch, where the sample axis comes from."""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._no_randomness import is_dropout
from ..._rerun import autocast_dtype
from ..._tree import join, split, tensors_of, tree_map
from ...errors import UnsupportedModelError
from .axis import SampleAxis
from .custom_functions import arguments_of_functions
from .probe import Probe, gradients_wanted
from .tracked_gradients import (
    BatchedOp,
    BatchedOpGradients,
    TrackedGradients,
    TrackedParameter,
    TrackedValue,
    refused,
    sum_to,
)
from .uses import UNSTEADY, UNTRIED, SampleAxes, UseLayout, guessed

Grads = list[Tensor | None]
# From saved tensors and output gradients: the sources they make.
Make = Callable[[list[Tensor], Grads], Sequence[Any]]

# Operations that broadcast their operands against each other: a shared one may be expanded to one row per sample first.
_BROADCAST = frozenset(
    "add sub subtract rsub mul multiply div divide true_divide where addcmul addcdiv lerp pow float_power maximum minimum fmax "
    "fmin masked_fill copy hypot atan2 logaddexp logaddexp2 xlogy copysign clamp clip iadd isub imul idiv itruediv radd rsub rmul "
    "rtruediv rdiv truediv".split()
)
_EXPANSIONS = ("expand", "broadcast_to", "repeat", "tile")
_LOOKS_ONLY = ("type_as", "to", "expand_as", "view_as", "reshape_as")
METADATA = frozenset(
    "size dim ndimension numel nelement stride is_floating_point is_complex is_contiguous element_size storage_offset data_ptr "
    "get_device is_inference is_pinned untyped_storage is_same_size is_nonzero item tolist numpy equal allclose __bool__ __int__ "
    "__float__ __index__ __len__ __format__ __hash__ __array__ __contains__ __set__ requires_grad_ register_hook retain_grad "
    "__deepcopy__ __reduce_ex__ __repr__ __dlpack__".split()
)
_TO_ELSEWHERE = frozenset("detach numpy tolist item data_ptr untyped_storage array dlpack".split())
_REARRANGEMENTS = frozenset(
    "T mT view reshape permute transpose t unsqueeze squeeze flatten unflatten contiguous movedim swapaxes select narrow".split()
)
# How often a pass that meets something new is tried again from the start; several times where it tosses coins.
_RETRIES = 8
_LISTS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack")
_DRAWS = ("dropout_p", "dropout")
VIEWS_BY_NAME = ("T", "mT", "H", "mH", "real", "imag")


class Recorder(Protocol):
    """What the tracker needs from the controller."""

    hooks_enabled: bool

    def tap(self, outputs: Sequence[Tensor], saved: list[Tensor], name: str, make: Make) -> list[Tensor]:
        """Return ``outputs``, watched: ``make`` is called with the tensors saved and the gradients that come back."""

    def scale(self, samples: int) -> float:
        """The factor that undoes the mean over the batch."""

    def discover_again(self) -> None:
        """Run the probes anew, in the middle of a forward pass."""

    def leaked(self, param: nn.Parameter) -> None:
        """Take note that autograd delivered a gradient to ``param``."""

    def in_backward(self) -> bool:
        """Whether a backward pass is running, so that what is run forwards is run again."""


def _is_float(tensor: Tensor) -> bool:
    if isinstance(tensor, TrackedTensor):
        return True
    return tensor.is_floating_point() or tensor.is_complex()


def _name_of(function: Any) -> str:
    name: str = getattr(function, "__name__", str(function))
    return name.removeprefix("__").removesuffix("__").rstrip("_") if name != "__get__" else name


def _attribute(function: Any) -> str:
    return str(getattr(getattr(function, "__self__", None), "__name__", ""))


class TrackedTensor(torch.Tensor):
    """A tensor that all samples share, computed from parameters only; reports each operation on it to its tracker."""

    tracker: "Tracker"
    label: int

    @property
    def content(self) -> TrackedValue:
        """What it holds, and how it came from parameters."""
        found: TrackedValue = vars(self)["_content"]
        if found.custom and not found.value.requires_grad:
            # What a custom function returned gets its history after the fact: autograd adds it to the same object.
            with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
                if self.requires_grad:
                    found = TrackedValue(self.as_subclass(torch.Tensor), found.roots, custom=True)
                    self.content = found
        return found

    @content.setter
    def content(self, content: TrackedValue) -> None:
        vars(self)["_content"] = content

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        skeleton, tensors = split((args, kwargs or {}))
        first = next((t for t in tensors if isinstance(t, TrackedTensor)), None)
        if first is None or "tracker" not in vars(first) or not first.tracker.recorder.hooks_enabled:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return first.tracker.apply(func, args, kwargs or {}, skeleton, tensors)


def _plain(tensor: Tensor) -> Tensor:
    """The same values, without history, and no longer followed."""
    if not isinstance(tensor, TrackedTensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.content.value.detach()


@dataclass(eq=False)
class Tracker:
    """Follows tracked tensors through a forward pass. State lives here, for as long as the controller does."""

    recorder: Recorder
    axes: SampleAxes
    rows: int | None = None
    strict: bool = False
    retries: int = 0
    probe: Probe | None = None
    counts: dict[Any, int] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    # For uses that differ from each other: what each was taken for in this forward pass, by the shapes it met.
    seen: dict[Any, list[tuple[Any, UseLayout]]] = field(default_factory=dict)
    names: dict[Any, str] = field(default_factory=dict)
    way: dict[Any, dict[str, str]] = field(default_factory=dict)

    # ---------------------------------------------------------------- lifting

    def track(self, param: nn.Parameter, name: str, outside: bool = False) -> TrackedTensor:
        """Return ``param`` as a tracked tensor; ``outside``: for use elsewhere than in its own module."""
        label = (name, outside)
        if self.probe is not None:
            return self._wrap(param.detach(), (TrackedParameter(param, param.detach(), name),), hash(label))
        with torch.enable_grad():
            leaf = param.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(lambda leaf: self._leaked(param, leaf))
            return self._wrap(leaf, (TrackedParameter(param, leaf, name),), hash(label))

    def _leaked(self, param: nn.Parameter, leaf: Tensor) -> None:
        leaf.grad = None
        self.recorder.leaked(param)

    def _wrap(self, value: Tensor, roots: tuple[TrackedParameter, ...], label: int) -> TrackedTensor:
        tracked = value.as_subclass(TrackedTensor)
        tracked.tracker, tracked.content, tracked.label = self, TrackedValue(value, roots), label
        return tracked

    def _adopt(self, tensor: Tensor, roots: tuple[TrackedParameter, ...], label: int) -> None:
        """Follow an ordinary tensor from now on: a shared one has been written into it."""
        shared = TrackedValue(tensor.as_subclass(torch.Tensor), roots)
        tensor.__class__ = TrackedTensor
        vars(tensor).update(tracker=self, _content=shared, label=label)

    def untrack(self, tree: Any) -> Any:
        """Return ``tree`` with ordinary tensors in the place of tracked ones; their gradients count as leaked."""
        if tree is not None:
            self._check_counts()
        if not any(isinstance(t, TrackedTensor) for t in tensors_of(tree)):
            return tree
        return tree_map(lambda leaf: leaf.content.value if isinstance(leaf, TrackedTensor) else leaf, tree)

    def _check_counts(self) -> None:
        """Refuse a forward pass that skipped some of several uses that differ: the others were taken for one another."""
        for key in self.seen:
            if self.counts.get(key) != len(self.axes.known.get(key, ())):
                self.seen = {}
                raise UnsupportedModelError(
                    f"{self.names[key]}: used a different number of times than in the runs that showed where the samples are, "
                    "and not every time in the same way (layers or branches that are skipped at random), so the per-sample "
                    "gradients cannot be told apart. Remedy: always run the same layers, or freeze the parameters with "
                    "requires_grad_(False)."
                )

    def begin(self, rows: int | None) -> None:
        """An outermost call begins, on ``rows`` samples."""
        self.rows, self.counts, self.seen, self.strict, self.retries = rows, {}, {}, False, 0

    def state(self) -> tuple[Any, ...]:
        """What belongs to the forward pass that is running, or was last."""
        return (self.rows, self.counts, self.seen, self.strict, self.retries)

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Go on with an earlier forward pass."""
        self.rows, self.counts, self.seen, self.strict, self.retries = state

    def is_touched(self, name: str) -> bool:
        """Whether probes saw the parameter ``name`` used outside its own module."""
        return hash((name, True)) in self.touched

    # ---------------------------------------------------------------- one operation

    def apply(self, func: Any, args: Any, kwargs: Any, skeleton: Any, tensors: list[Tensor]) -> Any:
        """Run ``func`` on arguments some of which are tracked."""
        tracked = [t for t in tensors if isinstance(t, TrackedTensor)]
        name = _name_of(func)
        inside = [] if torch.is_grad_enabled() else self._function_arguments()
        if inside and (name in _TO_ELSEWHERE or _attribute(func) == "data"):
            self._note_bypassed(inside)
        if name == "__get__":
            attribute = _attribute(func)
            if attribute in VIEWS_BY_NAME:
                if self.probe is not None:
                    self.touched.update(t.label for t in tracked)
                return self._shared_result(func, args, kwargs, tracked, attribute)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raw = getattr(func, "__name__", "")
        if raw == "__iter__":
            return iter(args[0].unbind(0))
        if raw in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        constant = name == "detach" or name.startswith("new_") or name.endswith("_like")
        wanted = bool(inside) or gradients_wanted(self.probe)
        if constant or not wanted or (name in _LOOKS_ONLY and not isinstance(tensors[0], TrackedTensor)):
            return self._on_values(func, skeleton, tensors)
        if is_dropout(name) and len(tensors) == 1:
            return self._shared_result(func, args, kwargs, tracked, name)
        if func is F.multi_head_attention_forward:
            return _multi_head_attention(*args, **kwargs)
        others = [t for t in tensors if not isinstance(t, TrackedTensor)]
        if name in _LOOKS_ONLY[:2] and len(others) == 1:  # it only asks for the type
            return tensors[0].to(others[0].device, others[0].dtype)
        labels = tuple(t.label for t in tracked)
        key = (name, tuple(sorted(set(labels))) if name in _LISTS else labels, len(others))
        count = self.counts.get(key, 0)
        if self.probe is not None:
            use = self.probe.arguments(others)
            result = None
            if use.reason is None and not any(use.inputs):
                result = self._shared_result(func, args, kwargs, tracked, name)
                if inside and not isinstance(result, (TrackedTensor, tuple, list)):
                    self._note_bypassed(inside)
                if not any(self.probe.counts_rows(t) for t in tensors_of(result)):
                    self._note(key, use)
                    return result
                probe = self.probe
                result = tree_map(
                    lambda leaf: probe.with_first_marked(_plain(leaf)) if isinstance(leaf, Tensor) else leaf, result
                )
            if inside:
                self._note_bypassed(inside)
            if result is None:
                result = self._on_values(func, skeleton, tensors)
            made = [t for t in tensors_of(result) if _is_float(t)]
            self._note(key, self.probe.results(use, others[:1] if name == "setitem" else made))
            return result
        use = self._find(
            key, count, others, lambda: _names([root for t in tracked for root in t.content.roots])
        ) or self._guess(others)
        if use.shared:
            if any(t.requires_grad for t in (*others, *(t for t in inside if not isinstance(t, TrackedTensor)))):
                use = UseLayout(reason="it met rows that depend on the batch in a way that was not foreseen")
            else:
                self.counts[key] = count + 1
                return self._shared_result(func, args, kwargs, tracked, name)
        self.counts[key] = count + 1
        if inside:  # to be found out, since the gradient goes to the arguments
            return self._on_values(func, skeleton, tensors)
        return self._run_batched(func, name, key, use, skeleton, tensors)

    def _note(self, key: Any, use: UseLayout) -> None:
        assert self.probe is not None
        self.counts[key] = self.counts.get(key, 0) + 1
        self.probe.note(key, use)
        self.touched.update(key[1])

    def _function_arguments(self) -> list[Tensor]:
        """The arguments of the custom autograd function that is running, if some of them are tracked."""
        for arguments in arguments_of_functions():
            tensors = [t for t in arguments if isinstance(t, Tensor)]
            if any(isinstance(t, TrackedTensor) for t in tensors):
                others = [t for t in tensors if not isinstance(t, TrackedTensor)]
                if self.probe is not None and any(self.probe.sample_axis(t) != (None, None) for t in others):
                    self._note_bypassed(tensors)
                return tensors
        return []

    def _note_bypassed(self, arguments: list[Tensor]) -> None:
        """Keep that a custom autograd function takes gradients straight to its arguments, past all that is followed."""
        if self.probe is not None:
            tracked = [t for t in arguments if isinstance(t, TrackedTensor)]
            params = {root.param: True for t in tracked for root in t.content.roots}
            self._note(("autograd function", tuple(t.label for t in tracked)), self.probe.bypassed(list(params)))

    def _on_values(self, func: Any, skeleton: Any, tensors: list[Tensor]) -> Any:
        args, kwargs = join(skeleton, [_plain(t) for t in tensors])
        return func(*args, **kwargs)

    # ---------------------------------------------------------------- calls of modules with a rule

    def call_of(self, name: str, inputs: list[Tensor]) -> UseLayout | None:
        """What is known about the next call of the module ``name``; None if it was never tried."""
        key = ("call", name)
        if self.probe is not None:
            return self.probe.arguments([t for t in inputs if not isinstance(t, TrackedTensor)])
        count = self.counts.get(key, 0)
        self.counts[key] = count + 1
        use = self._find(
            key, count, [t for t in inputs if not isinstance(t, TrackedTensor)], lambda: name or "the model"
        )
        if use is not None or self.rows is None:
            return use
        tracked = [guessed(t, self.axes.axis, self.rows) for t in inputs]
        return None if any(tracked) else UseLayout(shared=True)

    def _find(self, key: Any, count: int, tensors: list[Tensor], names: Callable[[], str]) -> UseLayout | None:
        """What probes have shown; where they have shown nothing yet, try again. None: the model cannot be tried."""
        several = self.axes.differ(key)
        shapes = tuple(t.shape for t in tensors) if several else ()
        if several and self.recorder.in_backward():  # checkpointing runs a part of the forward pass again
            found = [use for met, use in self.seen.get(key, ()) if met == shapes]
            if found:
                return found[0] if all(use == found[0] for use in found) else UseLayout(reason=UNSTEADY)
        use = self.axes.find(key, count)
        if use is not None and several:
            self.seen.setdefault(key, []).append((shapes, use))
            self.names[key] = names()
        if use is not None or not self.strict:
            return use
        if self.retries < _RETRIES:
            self.retries += 1
            self.recorder.discover_again()
            use = self.axes.find(key, count)
        if use is None:
            use = UseLayout(reason=UNTRIED)
            self.axes.known[key] = [*self.axes.known.get(key, []), use]
        return use

    def note_call(self, name: str, use: UseLayout | None, outputs: list[Tensor], *, repeated: bool) -> None:
        """Keep what a probe saw of a call of the module ``name``.

        Of a module that is ``repeated`` on each sample, outputs may be of any layout as long as the loss does not
        depend on them: that is seen when gradients come back. At the end there may be any number of those, as in a list with
        one for each sample.
        """
        assert self.probe is not None
        if use is not None:
            found = self.probe.results(use, outputs)
            if repeated and use.reason is None:
                known = found.outputs or ()
                last = max((i for i, at in enumerate(known) if at is not None), default=-1)
                found = replace(found, reason=None, outputs=known[: last + 1])
            self.probe.note(("call", name), found)

    def note_shared(self, name: str, use: UseLayout | None) -> None:
        """Keep that the module ``name`` was called with what all samples share."""
        if self.probe is not None and use is not None:
            self.probe.note(("call", name), use)

    def _guess(self, others: list[Tensor]) -> UseLayout:
        """For operations never tried: by shape; the self-check is the judge."""
        if self.rows is None:
            return UseLayout(reason="the number of samples is not known")
        sample_axes = tuple(guessed(t, self.axes.axis, self.rows) for t in others)
        return UseLayout(inputs=sample_axes, outputs=None, shared=not any(sample_axes))

    def _shared_result(self, func: Any, args: Any, kwargs: Any, tracked: list[TrackedTensor], name: str) -> Any:
        """Run an operation all of whose operands are shared; the result is tracked as well."""
        with torch._C.DisableTorchFunctionSubclass(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            out = func(*args, **kwargs)
        roots = tuple({id(root.param): root for t in tracked for root in t.content.roots}.values())
        label = (name, *(t.label for t in tracked))
        target: Any = args[0] if args else None
        plain = isinstance(target, Tensor) and not isinstance(target, TrackedTensor) and _is_float(target)
        if plain and (out is target or name == "setitem") and (self.probe is not None or target.requires_grad):
            self._adopt(target, roots, hash(label))
            return out
        position = iter(range(1 << 30))
        inside = not torch.is_grad_enabled()  # only what a custom function does is followed then
        custom = inside or any(t.content.custom for t in tracked)

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or isinstance(leaf, TrackedTensor) or not _is_float(leaf):
                return leaf
            if self.probe is None and not leaf.requires_grad and not inside:
                return leaf
            same = is_dropout(name)  # probes run without it
            wrapped = self._wrap(leaf, roots, tracked[0].label if same else hash((label, next(position))))
            wrapped.content.custom = custom
            wrapped.content.keeps_norm = self.probe is None and not custom and _rearranges(name, args, kwargs, tracked)
            return wrapped

        return tree_map(wrap, out)

    # ---------------------------------------------------------------- meeting the batch

    def _run_batched(self, func: Any, name: str, key: Any, use: UseLayout, skeleton: Any, tensors: list[Tensor]) -> Any:
        tracked = {i: t for i, t in enumerate(tensors) if isinstance(t, TrackedTensor)}
        roots = [root for t in tracked.values() for root in t.content.roots]
        if use.reason is not None:
            self._check_out_of_place(func, skeleton, roots)
            return self._refuse(func, skeleton, tensors, roots, use.reason)
        if name == "setitem":
            return self._set_rows(func, skeleton, tensors, tracked, use)
        expandable = name in _BROADCAST or (
            name in ("matmul", "rmatmul") and all(t.dim() > 2 for i, t in enumerate(tensors) if i not in tracked)
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

        return self._tapped(self._on_values(func, skeleton, tensors), [], make, roots)

    def _tapped(self, out: Any, saved: list[Tensor], make: Make, roots: Sequence[TrackedParameter]) -> Any:
        whole, made = split(out)
        floats = [t for t in made if _is_float(t)]
        if not floats:
            return out
        queue = iter(self.recorder.tap(floats, saved, _names(roots), make))
        return join(whole, [next(queue) if _is_float(t) else t for t in made])

    def _shape_of(self, name: str, use: UseLayout, tensors: list[Tensor]) -> tuple[tuple[int, ...], SampleAxis] | None:
        """Shape of the broadcast result, and where samples are in it."""
        if name == "scaled_dot_product_attention":
            q, k = tensors[0], tensors[1]
            shape: tuple[int, ...] = (*q.shape[:-1], k.shape[-2])
        elif name in ("matmul", "rmatmul"):
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
        if sample_axis.axis >= len(shape) or (name in ("matmul", "rmatmul") and sample_axis.axis >= len(shape) - 2):
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
            n = self.rows
            if found is None or n is None or found[1].factors(found[0][found[1].axis], n) is None:
                return False, None
            shape, sample_axis = found
            wide: list[Tensor] = list(tensors)
            dtype = None
            if all(t.dim() == 0 for t in tracked.values()):
                moving = [t for t in tensors if not isinstance(t, TrackedTensor) and _is_float(t)]
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
        name = _names(shared.roots)

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            (grad,) = grads
            assert grad is not None
            shape = tuple(shared.value.shape)
            rows = grad.new_zeros((0, *shape)) if n == 0 else sum_to(sample_axis.samples(grad, n), shape)
            return [TrackedGradients(shared, rows, self.recorder.scale(n), name)]

        return self.recorder.tap([expanded], [], name, make)[0]

    def _set_rows(
        self, func: Any, skeleton: Any, tensors: list[Tensor], tracked: dict[int, TrackedTensor], use: UseLayout
    ) -> Any:
        """``batched[index] = shared``: the same index on a tensor of sample numbers says whose rows were set."""
        (target, index, value), _ = join(skeleton, list(tensors))
        roots = [root for t in tracked.values() for root in t.content.roots]
        sample_axis = use.inputs[0] if use.inputs else None
        n = self.rows
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
        shared, name = value.content, _names(roots)
        with torch._C.DisableTorchFunctionSubclass():
            wide = shared.value.detach().expand(owner.shape)

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            (grad,) = grads
            assert grad is not None
            own = tuple(shared.value.shape)
            rows = [grad.new_zeros((0, *own))]
            rows += [sum_to(grad.masked_fill(owner != i, 0)[None], own) for i in range(n)]
            return [TrackedGradients(shared, torch.cat(rows), self.recorder.scale(n), name)]

        target[index] = self.recorder.tap([wide], [], name, make)[0]
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
        out = self._on_values(func, skeleton, tensors)
        n = self.rows
        floats = [t for t in tensors_of(out) if _is_float(t)]
        if not floats:
            return out
        outputs = use.outputs
        if outputs is None and n is not None:
            outputs = tuple(guessed(t, self.axes.axis, n) for t in floats)
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
        op = BatchedOp(func, skeleton, shared, sample_axes, list(outputs), _names(roots), autocast)  # type: ignore[arg-type]
        first = outputs[0]
        expands = not positions and len(shared) == len(outputs) == 1 and name in _EXPANSIONS
        if expands and first is not None and first.outer == 1:  # the adjoint of an expansion is a sum
            return self._one_row_per_sample(out, next(iter(shared.values())), first, n)
        how = self.way.setdefault(key, {})

        def make(saved: list[Tensor], grads: Grads) -> list[Any]:
            plain = dict(zip(positions, saved, strict=True))
            return [BatchedOpGradients(op, plain, grads, n, self.recorder.scale(n), how)]

        return self._tapped(out, [tensors[i].detach() for i in positions], make, roots)


def _rearranges(name: str, args: Any, kwargs: Any, tracked: list[TrackedTensor]) -> bool:
    """Whether the result holds numbers of one parameter, each at most once."""
    (first, *more) = tracked
    if more or not (first.content.is_parameter or first.content.keeps_norm):
        return False
    if name == "embedding" and len(args) == 3 - ("padding_idx" in kwargs) and isinstance(args[0], Tensor):
        padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
        return padding is None and args[0].unique().numel() == args[0].numel()
    return name in _REARRANGEMENTS


def _names(roots: Sequence[TrackedParameter]) -> str:
    return ", ".join(sorted({root.name for root in roots}))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _probabilities(name: str, skeleton: Any) -> list[float]:
    args, kwargs = skeleton
    found = [kwargs[key] for key in _DRAWS if isinstance(kwargs.get(key), float)]
    if name == "scaled_dot_product_attention" and len(args) > 4:
        found.append(args[4])
    return found


def _body_of(function: Any) -> Any:
    """Return a function of ``torch.nn.functional`` that runs its steps one by one on tensors of any class."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


_multi_head_attention = _body_of(F.multi_head_attention_forward)
