"""Parameters used outside a layer rule: they are followed until they meet the batch, where the sample axis comes from."""

import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._operations import (
    ASKS_FOR_TYPE,
    ASKS_ONLY,
    JOINS,
    LEAVES_AUTOGRAD,
    METADATA,
    REARRANGEMENTS,
    VIEWS_BY_NAME,
    is_dropout,
)
from ..._tree import tensors_of, tree_map
from ...errors import UnsupportedModelError
from ..calls.session import Session
from .batched_op import BatchedOps
from .custom_functions import arguments_of_functions
from .probe import Probe, gradients_wanted
from .tracked import TrackedTensor, attribute_of, is_float, name_of, on_values, plain
from .tracked_value import TrackedParameter, TrackedValue, names_of
from .uses import UNSTEADY, UNTRIED, SampleAxes, UseLayout, guessed

# How often a pass that meets something new is tried again from the start; several times where it tosses coins.
_RETRIES = 8


@dataclass(eq=False)
class Tracker:
    """Follows tracked tensors through a forward pass. State lives here, for as long as the controller does."""

    session: Session
    axes: SampleAxes
    # The run on other numbers of rows that is going on.
    probe: Probe | None = None
    # Runs probes anew, in the middle of a forward pass that met what none has shown.
    discover: Callable[[], None] = lambda: None
    _touched: set[int] = field(default_factory=set)
    _names: dict[Any, str] = field(default_factory=dict)
    _batched_ops: BatchedOps = field(init=False)

    def __post_init__(self) -> None:
        """Both know the same session."""
        self._batched_ops = BatchedOps(self.session)

    # ---------------------------------------------------------------- tracking

    def track(self, param: nn.Parameter, name: str, outside: bool = False) -> TrackedTensor:
        """Return ``param`` as a tracked tensor; ``outside``: for use elsewhere than in its own module."""
        label = (name, outside)
        if self.probe is not None:
            return self._wrap(param.detach(), (TrackedParameter(param, param.detach(), name),), hash(label))
        with torch.enable_grad():
            leaf = param.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(lambda leaf: self._leaked(name, param, leaf))
            return self._wrap(leaf, (TrackedParameter(param, leaf, name),), hash(label))

    def _leaked(self, name: str, param: nn.Parameter, leaf: Tensor) -> None:
        leaf.grad = None
        self.session.leaked(name, param)

    def _wrap(self, value: Tensor, roots: tuple[TrackedParameter, ...], label: int) -> TrackedTensor:
        tracked = value.as_subclass(TrackedTensor)
        tracked.session, tracked.operate, tracked.label = self.session, self.apply, label
        tracked.content = TrackedValue(value, roots)
        return tracked

    def _adopt(self, tensor: Tensor, roots: tuple[TrackedParameter, ...], label: int) -> None:
        """Follow an ordinary tensor from now on: a shared one has been written into it."""
        shared = TrackedValue(tensor.as_subclass(torch.Tensor), roots)
        tensor.__class__ = TrackedTensor
        vars(tensor).update(session=self.session, operate=self.apply, _content=shared, label=label)

    def untrack(self, tree: Any) -> Any:
        """Return ``tree`` with ordinary tensors in the place of tracked ones; their gradients count as leaked."""
        if tree is not None:
            self._check_counts()
        if not any(isinstance(t, TrackedTensor) for t in tensors_of(tree)):
            return tree
        return tree_map(lambda leaf: leaf.content.value if isinstance(leaf, TrackedTensor) else leaf, tree)

    def _check_counts(self) -> None:
        """Refuse a forward pass that skipped some of several uses that differ: the others were taken for one another."""
        call = self.session.call
        for key in call.seen:
            if call.counts.get(key) != len(self.axes.known.get(key, ())):
                call.seen = {}
                raise UnsupportedModelError(
                    f"{self._names[key]}: used a different number of times than in the runs that showed where the samples are, "
                    "and not every time in the same way (layers or branches that are skipped at random), so the per-sample "
                    "gradients cannot be told apart. Remedy: always run the same layers, or freeze the parameters with "
                    "requires_grad_(False)."
                )

    def is_touched(self, name: str) -> bool:
        """Whether probes saw the parameter ``name`` used outside its own module."""
        return hash((name, True)) in self._touched

    # ---------------------------------------------------------------- one operation

    def apply(self, func: Any, args: Any, kwargs: Any, skeleton: Any, tensors: list[Tensor]) -> Any:
        """Run ``func`` on arguments some of which are tracked."""
        tracked = [t for t in tensors if isinstance(t, TrackedTensor)]
        name = name_of(func)
        inside = [] if torch.is_grad_enabled() else self._function_arguments()
        if inside and (name in LEAVES_AUTOGRAD or attribute_of(func) == "data"):
            self._note_bypassed(inside)
        if name == "__get__":
            attribute = attribute_of(func)
            if attribute in VIEWS_BY_NAME:
                if self.probe is not None:
                    self._touched.update(t.label for t in tracked)
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
        if constant or not wanted or (name in ASKS_ONLY and not isinstance(tensors[0], TrackedTensor)):
            return on_values(func, skeleton, tensors)
        if is_dropout(name) and len(tensors) == 1:
            return self._shared_result(func, args, kwargs, tracked, name)
        if func is F.multi_head_attention_forward:
            return _multi_head_attention(*args, **kwargs)
        others = [t for t in tensors if not isinstance(t, TrackedTensor)]
        if name in ASKS_FOR_TYPE and len(others) == 1:  # it only asks for the type
            return tensors[0].to(others[0].device, others[0].dtype)
        labels = tuple(t.label for t in tracked)
        key = (name, tuple(sorted(set(labels))) if name in JOINS else labels, len(others))
        count = self.session.call.counts.get(key, 0)
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
                    lambda leaf: probe.with_first_marked(plain(leaf)) if isinstance(leaf, Tensor) else leaf, result
                )
            if inside:
                self._note_bypassed(inside)
            if result is None:
                result = on_values(func, skeleton, tensors)
            made = [t for t in tensors_of(result) if is_float(t)]
            self._note(key, self.probe.results(use, others[:1] if name == "setitem" else made))
            return result
        use = self._find(
            key, count, others, lambda: names_of([root for t in tracked for root in t.content.roots])
        ) or self._guess(others)
        if use.shared:
            if any(t.requires_grad for t in (*others, *(t for t in inside if not isinstance(t, TrackedTensor)))):
                use = UseLayout(reason="it met rows that depend on the batch in a way that was not foreseen")
            else:
                self.session.call.counts[key] = count + 1
                return self._shared_result(func, args, kwargs, tracked, name)
        self.session.call.counts[key] = count + 1
        if inside:  # to be found out, since the gradient goes to the arguments
            return on_values(func, skeleton, tensors)
        return self._batched_ops.run(func, name, key, use, skeleton, tensors)

    def _note(self, key: Any, use: UseLayout) -> None:
        assert self.probe is not None
        self.session.call.counts[key] = self.session.call.counts.get(key, 0) + 1
        self.probe.note(key, use)
        self._touched.update(key[1])

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

    # ---------------------------------------------------------------- calls of modules with a rule

    def call_of(self, name: str, inputs: list[Tensor]) -> UseLayout | None:
        """What is known about the next call of the module ``name``; None if it was never tried."""
        key = ("call", name)
        if self.probe is not None:
            return self.probe.arguments([t for t in inputs if not isinstance(t, TrackedTensor)])
        count = self.session.call.counts.get(key, 0)
        self.session.call.counts[key] = count + 1
        use = self._find(
            key, count, [t for t in inputs if not isinstance(t, TrackedTensor)], lambda: name or "the model"
        )
        if use is not None or self.session.call.rows is None:
            return use
        tracked = [guessed(t, self.session.axis, self.session.call.rows) for t in inputs]
        return None if any(tracked) else UseLayout(shared=True)

    def _find(self, key: Any, count: int, tensors: list[Tensor], names: Callable[[], str]) -> UseLayout | None:
        """What probes have shown; where they have shown nothing yet, try again. None: the model cannot be tried."""
        several = self.axes.differ(key)
        shapes = tuple(t.shape for t in tensors) if several else ()
        if several and self.session.in_backward():  # checkpointing runs a part of the forward pass again
            found = [use for met, use in self.session.call.seen.get(key, ()) if met == shapes]
            if found:
                return found[0] if all(use == found[0] for use in found) else UseLayout(reason=UNSTEADY)
        use = self.axes.find(key, count)
        if use is not None and several:
            self.session.call.seen.setdefault(key, []).append((shapes, use))
            self._names[key] = names()
        if use is not None or not self.session.call.strict:
            return use
        if self.session.call.retries < _RETRIES:
            self.session.call.retries += 1
            self.discover()
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
        if self.session.call.rows is None:
            return UseLayout(reason="the number of samples is not known")
        sample_axes = tuple(guessed(t, self.session.axis, self.session.call.rows) for t in others)
        return UseLayout(inputs=sample_axes, outputs=None, shared=not any(sample_axes))

    def _shared_result(self, func: Any, args: Any, kwargs: Any, tracked: list[TrackedTensor], name: str) -> Any:
        """Run an operation all of whose operands are shared; the result is tracked as well."""
        with torch._C.DisableTorchFunctionSubclass(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            out = func(*args, **kwargs)
        roots = tuple({id(root.param): root for t in tracked for root in t.content.roots}.values())
        label = (name, *(t.label for t in tracked))
        target: Any = args[0] if args else None
        plain = isinstance(target, Tensor) and not isinstance(target, TrackedTensor) and is_float(target)
        if plain and (out is target or name == "setitem") and (self.probe is not None or target.requires_grad):
            self._adopt(target, roots, hash(label))
            return out
        position = iter(range(1 << 30))
        inside = not torch.is_grad_enabled()  # only what a custom function does is followed then
        custom = inside or any(t.content.custom for t in tracked)

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or isinstance(leaf, TrackedTensor) or not is_float(leaf):
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


def _rearranges(name: str, args: Any, kwargs: Any, tracked: list[TrackedTensor]) -> bool:
    """Whether the result holds numbers of one parameter, each at most once."""
    (first, *more) = tracked
    if more or not (first.content.is_parameter or first.content.keeps_norm):
        return False
    if name == "embedding" and len(args) == 3 - ("padding_idx" in kwargs) and isinstance(args[0], Tensor):
        padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
        return padding is None and args[0].unique().numel() == args[0].numel()
    return name in REARRANGEMENTS


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _body_of(function: Any) -> Any:
    """Return a function of ``torch.nn.functional`` that runs its steps one by one on tensors of any class."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


_multi_head_attention = _body_of(F.multi_head_attention_forward)
