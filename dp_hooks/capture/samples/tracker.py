"""Parameters used outside a layer rule: they are followed until they meet the batch, where the sample axis comes from."""

import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._operations import ASKS_FOR_TYPE, ASKS_ONLY, JOINS, LEAVES_AUTOGRAD, METADATA, REARRANGEMENTS, VIEWS_BY_NAME, is_dropout
from ..._tree import tensors_of, tree_map
from ...errors import UnsupportedModelError
from ..calls.session import Session
from .batched_op import BatchedUse
from .custom_functions import arguments_of_functions
from .probe import Probe, gradients_wanted
from .tracked import TrackedTensor, attribute_of, in_transform, is_float, name_of, on_values, same_storage, works_in_place
from .tracked_value import Memory, TrackedParameter, TrackedValue, names_of, roots_of
from .uses import UNSTEADY, UNTRIED, SampleAxes, UseLayout, guessed

_RETRIES = 8  # how often a pass that meets something new is tried again from the start; several times where it tosses coins


@dataclass(eq=False)
class Tracker:
    """Follows tracked tensors through a forward pass. State lives here, for as long as the controller does."""

    session: Session
    axes: SampleAxes
    probe: Probe | None = None  # the run on other numbers of rows that is going on
    discover: Callable[[], None] = lambda: None  # runs probes anew, in the middle of a forward pass that met what none has shown
    _touched: set[int] = field(default_factory=set)
    # Per use that meets the batch, whether samples can be cut out of the operation.
    _ways: dict[Any, dict[str, str]] = field(default_factory=dict)

    def track(self, param: nn.Parameter, name: str, outside: bool = False) -> TrackedTensor:
        """Return ``param`` as a tracked tensor; ``outside``: for use elsewhere than in its own module."""
        leaf = param.detach()
        if self.probe is None:
            leaf.requires_grad_().register_post_accumulate_grad_hook(lambda leaf: self._leaked(name, param, leaf))
        content = TrackedValue(leaf, Memory({id(param): TrackedParameter(param, leaf, name)}))
        with torch.enable_grad():
            return self._follow(leaf.as_subclass(TrackedTensor), content, hash((name, outside)))

    def _leaked(self, name: str, param: nn.Parameter, leaf: Tensor) -> None:
        leaf.grad = None
        self.session.leaked(name, param)

    def _follow(self, tensor: Any, content: TrackedValue, label: int) -> TrackedTensor:
        """Follow ``tensor`` from now on, also an ordinary one that a shared one was written into."""
        tensor.__class__ = TrackedTensor
        vars(tensor).update(session=self.session, operate=self.apply, label=label, _content=content)
        content.memory.tensors.append(weakref.ref(tensor))
        return cast(TrackedTensor, tensor)

    def untrack(self, tree: Any) -> Any:
        """Return ``tree`` with ordinary tensors in the place of tracked ones; their gradients count as leaked."""
        if tree is not None:
            self._check_counts()
        if not any(isinstance(t, TrackedTensor) for t in tensors_of(tree)):
            return tree
        return tree_map(lambda leaf: leaf.content.value if isinstance(leaf, TrackedTensor) else leaf, tree)

    def _check_counts(self) -> None:
        """Refuse a forward pass that skipped some of several uses that differ: the others were taken for one another."""
        call, axes = self.session.call, self.axes
        for key, uses in call.uses.items():
            if axes.differ(key) and len(uses) != len(axes.known[key]):
                call.uses = {}
                raise UnsupportedModelError(
                    f"{axes.known[key][0].name}: used a different number of times than in the runs that showed where the samples "
                    "are, and not every time in the same way (layers or branches that are skipped at random), so the per-sample "
                    "gradients cannot be told apart. Remedy: always run the same layers, or freeze the parameters with "
                    "requires_grad_(False)."
                )

    def is_touched(self, name: str) -> bool:
        """Whether probes saw the parameter ``name`` used outside its own module."""
        return hash((name, True)) in self._touched

    def apply(self, func: Any, args: Any, kwargs: Any, skeleton: Any, tensors: list[Tensor]) -> Any:
        """Run ``func`` on arguments some of which are tracked."""
        tracked = [t for t in tensors if isinstance(t, TrackedTensor)]
        name = name_of(func)
        inside = [] if torch.is_grad_enabled() else self._function_arguments()
        attribute = attribute_of(func) if name == "__get__" else ""
        if inside and (name in LEAVES_AUTOGRAD or attribute == "data"):
            self._note_bypassed(inside)
        if attribute in VIEWS_BY_NAME:
            if self.probe is not None:
                self._touched.update(t.label for t in tracked)
            return self._shared_result(func, args, kwargs, tracked, attribute)
        raw = getattr(func, "__name__", "")
        if raw == "__iter__":
            return iter(args[0].unbind(0))
        if raw in METADATA or name == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if self.probe is not None and in_transform():
            self._note_bypassed(tracked)
            return on_values(func, skeleton, tensors)
        constant = name == "detach" or name.startswith("new_") or name.endswith("_like")
        wanted = bool(inside) or gradients_wanted(self.probe)
        if constant or not wanted or (name in ASKS_ONLY and not isinstance(tensors[0], TrackedTensor)):
            return on_values(func, skeleton, tensors)
        if is_dropout(name) and len(tensors) == 1:
            return self._shared_result(func, args, kwargs, tracked, name)
        if func is F.multi_head_attention_forward:
            return _multi_head_attention(*args, **kwargs)
        if func is torch.functional.broadcast_tensors:  # of which some may come back as they are
            shape = torch.broadcast_shapes(*(t.shape for t in tensors))
            return tuple(t.expand(shape) for t in tensors)
        others = [t for t in tensors if not isinstance(t, TrackedTensor)]
        if name in ASKS_FOR_TYPE and len(others) == 1:  # it only asks for the type
            return tensors[0].to(others[0].device, others[0].dtype)
        labels = tuple([t.label for t in tracked])
        key = (name, tuple(sorted(set(labels))) if name in JOINS else labels, len(others))
        if self.probe is not None:
            use = self.probe.arguments(others, names_of([root for t in tracked for root in t.content.roots]))
            result = None
            if use.shared:
                result = self._shared_result(func, args, kwargs, tracked, name)
                if inside and not isinstance(result, (TrackedTensor, tuple, list)):
                    self._note_bypassed(inside)
                if not any(self.probe.counts_rows(t) for t in tensors_of(result)):
                    self._note(key, use)
                    return result
                result = tree_map(self.probe.with_first_marked, result)
            if inside:
                self._note_bypassed(inside)
            if result is None:
                result = on_values(func, skeleton, tensors)
            made = [t for t in tensors_of(result) if is_float(t)]
            self._note(key, self.probe.results(use, others[:1] if name == "setitem" else made))
            return result
        use = self._find(key, others) or self._guess(others)
        if use.shared:
            if not any(t.requires_grad for t in (*others, *(t for t in inside if not isinstance(t, TrackedTensor)))):
                return self._shared_result(func, args, kwargs, tracked, name)
            use = UseLayout(reason="it met rows that depend on the batch in a way that was not foreseen")
        if inside:  # to be found out, since the gradient goes to the arguments
            return on_values(func, skeleton, tensors)
        return BatchedUse(self.session, func, name, use, skeleton, tensors, self._ways.setdefault(key, {})).run()

    def _note(self, key: Any, use: UseLayout) -> None:
        assert self.probe is not None
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

    def _note_bypassed(self, arguments: Sequence[Tensor]) -> None:
        """Keep that a custom autograd function takes gradients straight to its arguments, past all that is followed."""
        if self.probe is not None:
            tracked = [t for t in arguments if isinstance(t, TrackedTensor)]
            params = {root.param: True for t in tracked for root in t.content.roots}
            self._note(("autograd function", tuple(t.label for t in tracked)), self.probe.bypassed(list(params)))

    def call_of(self, name: str, inputs: list[Tensor]) -> UseLayout | None:
        """What is known about the next call of the module ``name``; None if no probe has shown it."""
        if self.probe is not None:
            return self.probe.arguments(inputs, name or "the model")
        use, rows = self._find(("call", name), inputs), self.session.call.rows
        if use is None and rows is not None and not any(guessed(t, self.session.axis, rows) for t in inputs):
            return UseLayout(shared=True)
        return use

    def _find(self, key: Any, tensors: list[Tensor]) -> UseLayout | None:
        """What probes have shown of the next use of ``key``; where nothing yet, run some. None: the model cannot be probed."""
        call, axes = self.session.call, self.axes
        uses = call.uses.setdefault(key, [])
        shapes = tuple([t.shape for t in tensors])
        if axes.differ(key) and self.session.in_backward():  # checkpointing runs a part of the forward pass again
            found = {use for met, use in uses if met == shapes}
            if found:
                return found.pop() if len(found) == 1 else UseLayout(reason=UNSTEADY)
        use = axes.find(key, len(uses))
        if use is None and call.strict:
            if call.retries < _RETRIES:
                call.retries += 1
                self.discover()
                use = axes.find(key, len(uses))
            if use is None:
                use = UseLayout(reason=UNTRIED)
                axes.known[key] = [*axes.known.get(key, []), use]
        uses.append((shapes, use))
        return use

    def note_call(self, name: str, use: UseLayout | None, outputs: list[Tensor], *, repeated: bool) -> None:
        """Keep what a probe saw of a call of the module ``name``.

        Of a module that is ``repeated`` on each sample, outputs may be of any layout as long as the loss does not depend on them:
        that is seen when gradients come back. At the end there may be any number of those, as in a list with one for each sample.
        """
        assert self.probe is not None
        if use is not None:
            found = self.probe.results(use, outputs)
            if repeated and use.reason is None:
                known = found.outputs or ()
                last = max((i for i, at in enumerate(known) if at is not None), default=-1)
                found = replace(found, reason=None, outputs=known[: last + 1])
            self.probe.note(("call", name), found)

    def _guess(self, others: list[Tensor]) -> UseLayout:
        """For what no probe has shown: by shape; the self-check is the judge."""
        if self.session.call.rows is None:
            return UseLayout(reason="the number of samples is not known")
        sample_axes = tuple(guessed(t, self.session.axis, self.session.call.rows) for t in others)
        return UseLayout(inputs=sample_axes, outputs=None, shared=not any(sample_axes))

    def _write(self, memory: Memory, tracked: list[TrackedTensor]) -> None:
        """Tensors are about to be written into ``memory``: what they come from is behind all that is in it, from here on."""
        memory.roots |= roots_of(t.content for t in tracked)
        memory.is_written = True
        if self.probe is not None:
            return
        memory.tensors = [ref for ref in memory.tensors if ref() is not None]
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            for tensor in [ref() for ref in memory.tensors]:
                assert isinstance(tensor, TrackedTensor)
                before = tensor.content
                tensor.content = replace(before)
                before.value = before.value.clone()  # for uses so far, gradients of which go back past what is written

    def _shared_result(self, func: Any, args: Any, kwargs: Any, tracked: list[TrackedTensor], name: str) -> Any:
        """Run an operation all of whose operands are shared; the result is tracked as well."""
        if works_in_place(func) and isinstance(args[0], TrackedTensor):
            self._write(args[0].content.memory, tracked)
        with torch._C.DisableTorchFunctionSubclass(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            out = func(*args, **kwargs)
        roots = roots_of(t.content for t in tracked)
        label = (name, *(t.label for t in tracked))
        target: Any = args[0] if args else None
        plain = isinstance(target, Tensor) and not isinstance(target, TrackedTensor) and is_float(target)
        if plain and (out is target or name == "setitem") and (self.probe is not None or target.requires_grad):
            self._follow(target, TrackedValue(target.as_subclass(torch.Tensor), Memory(roots)), hash(label))
            return out
        position = iter(range(1 << 30))
        inside = not torch.is_grad_enabled()  # only what a custom function does is followed then
        custom = inside or any(t.content.custom for t in tracked)

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or isinstance(leaf, TrackedTensor) or not is_float(leaf):
                return leaf
            if self.probe is None and not leaf.requires_grad and not inside:
                return leaf
            keeps_norm = self.probe is None and not custom and _rearranges(name, args, kwargs, tracked)
            viewed = (t.content.memory for t in tracked if leaf._is_view() and same_storage(leaf, t.content.value))
            memory = next(viewed, None) or Memory(roots)
            memory.roots |= roots
            own = tracked[0].label if is_dropout(name) else hash((label, next(position)))  # probes run without dropout
            return self._follow(leaf.as_subclass(TrackedTensor), TrackedValue(leaf, memory, keeps_norm, custom), own)

        return tree_map(wrap, out)


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
