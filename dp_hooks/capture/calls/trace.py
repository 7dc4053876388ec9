"""Which operations a forward pass went through: a model that takes a new way is looked at anew."""

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from typing_extensions import ParamSpec, TypeVar

from ..._no_randomness import Draws
from ..._operations import CHANGES_GRADIENT, DRAWS, METADATA, TAKES_SIZES, VIEWS_BY_NAME

P = ParamSpec("P")
T = TypeVar("T")
Transition = tuple[Any, Any, Any]  # one operation: the module it was in, the number of what came before it there, and its own
_ENDS, _FEW = frozenset((-1, 0)), frozenset(range(-5, 5))
# Factors are told apart by their power of two, from this one up to 1: a schedule that rises is looked at as it does.
_SMALLEST = -14
_CALL = -1  # the number of a call of a module
_PLAIN = frozenset((bool, str, type(None), type(Ellipsis)))  # kept as they are


class _Paused(threading.local):
    depth = 0


_paused = _Paused()


def untraced(method: Callable[P, T]) -> Callable[P, T]:
    """What ``method`` does is no part of the way that a model takes, whichever model it is for."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        _paused.depth += 1
        try:
            return method(*args, **kwargs)
        finally:
            _paused.depth -= 1

    return run


def _kind(value: Any, sized: bool) -> Any:
    """What is kept of an argument: enough to tell dimensions and switches apart, not numbers that change all the time."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        return value if value in _ENDS or (not sized and value in _FEW) else int
    if kind is slice:
        start, stop, step = value.start, value.stop, value.step
        if isinstance(start, Tensor) or isinstance(stop, Tensor) or isinstance(step, Tensor):
            return slice
        empty = start is not None and start == stop
        return (slice, _kind(start, sized), _kind(stop, sized), _kind(step, sized), empty)
    if isinstance(value, (bool, str)):  # of a class derived from it, as switches and dimensions may be
        return value
    if isinstance(value, int):
        return _kind(int(value), sized)
    if isinstance(value, float):
        return value if value in (0.0, 1.0) else (float, min(1, max(_SMALLEST, math.frexp(value)[1])))
    if isinstance(value, Tensor):
        return kind
    if isinstance(value, (tuple, list)) and len(value) <= 8:
        return tuple(_kinds(value, sized))
    numpy = sys.modules.get("numpy")
    return _kind(value.item(), sized) if numpy is not None and isinstance(value, numpy.generic) else type(value)


def _kinds(values: Sequence[Any], sized: bool) -> list[Any]:
    """:func:`_kind` of each, without a call of it for what there is most of."""
    few = _ENDS if sized else _FEW
    return [
        kind
        if (kind := type(a)) is Tensor or kind is Parameter
        else a
        if kind in _PLAIN
        else _kind(a, sized)
        if kind is not int
        else a
        if a in few
        else int
        for a in values
    ]


_MEANS_OF_TARGETS = ("cross_entropy", "nll_loss")  # and what has these names inside its own


def _uneven(args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int | None) -> Any:
    """Whether a mean over targets leaves out some of them, or counts some more; and some samples of them, wherever these may be.

    Then it is over all samples together. With targets that are all alike it cannot be told from a mean of means.
    """
    if kwargs.get("reduction") in ("none", "sum", 0, 2):
        return None
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    target = next((t for t in given if not t.is_floating_point() and not t.is_complex()), None)
    if target is None or target.is_meta or not target.dim() or torch._C._functorch.is_functorch_wrapped_tensor(target):
        return None
    ignored = kwargs.get("ignore_index", args[4] if len(args) > 4 else None)
    counted = (target != (-100 if ignored is None else ignored)).double()
    weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
    if isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point():
        counted = counted * weight.detach()[target.where(counted > 0, 0)].to(counted)
    sizes = [counted.flatten()]
    if samples and counted.numel() % samples == 0:
        sizes += [counted.reshape(samples, -1).sum(1), counted.reshape(-1, samples).sum(0)]
        sizes += [counted.movedim(axis, 0).flatten(1).sum(1) for axis in range(1, counted.dim()) if counted.shape[axis] == samples]
    return tuple(torch.stack([(size != size[:1]).any() for size in sizes]).tolist())


@dataclass(frozen=True, slots=True, eq=False)
class _Function:
    """What is known of a torch function by its name alone."""

    name: str
    followed: bool  # whether it computes something
    sized: bool
    draws: bool
    made_new: bool  # of its arguments only shape and type count
    mean: bool  # of targets


_functions: dict[Any, _Function] = {}  # what was asked for, by the function
_MOST = 4096  # of these, and of shapes
_ORDINARY = frozenset((Tensor, Parameter))


def _function(func: Any) -> _Function:
    if len(_functions) >= _MOST:
        _functions.clear()
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
        followed = name in VIEWS_BY_NAME
    else:
        followed = name not in METADATA or name in CHANGES_GRADIENT
    made_new = name.startswith("new_") or name.endswith("_like")
    found = _functions[func] = _Function(
        name, followed, name in TAKES_SIZES, name in DRAWS, made_new, any(mean in name for mean in _MEANS_OF_TARGETS)
    )
    return found


class _Follow(TorchFunctionMode):
    def __init__(self, trace: "OpTrace") -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        function = _functions.get(func) or _function(func)
        if not function.followed or _paused.depth:
            return func(*args, **kwargs) if kwargs else func(*args)
        trace = self._trace
        constant = trace.note(function, args, kwargs)
        out = func(*args, **kwargs) if kwargs else func(*args)
        if constant:
            trace.note_constant(function, args, out)
        if function.draws:
            trace.note_draw(function.name, out)
        return out


@dataclass(eq=False)
class OpTrace:
    """Follows forward passes, and tells operations that no checked pass went through in that order.

    What is learned from one batch (where the samples are, that they do not mix) holds for the operations that batch
    went through. Python code may take another branch later: a flag, a schedule, an option of the call. Per module every pair of
    operations in sequence is remembered, with dimensions, switches and the powers of two of factors; sizes and data are not.
    What is made of constants and buffers alone (masks, position codes) counts only where it has an axis as long as the batch.
    """

    buffers: Callable[[], Iterable[Tensor]] = tuple
    keeps_generators: bool = True  # for passes that draw, and are run again by what it keeps
    rows: int | None = None
    # What the present pass, or the last one, went through and no checked pass of several samples did.
    unverified: set[Transition] = field(default_factory=set)
    draws: Draws = field(default_factory=Draws)  # what it drew
    drawn_inside: Draws = field(default_factory=Draws)  # what it drew since the outermost call of a module began
    _verified: dict[str, set[Transition]] = field(default_factory=lambda: {"one": set(), "many": set()})
    _known: set[Transition] = field(default_factory=set)
    _whole: bool = False
    _frames: list[list[Any]] = field(default_factory=list)
    # Tensors that depend on neither inputs nor parameters, by identity; held, so that identities stay theirs.
    _constants: dict[int, Tensor] = field(default_factory=dict)
    _from_constants: set[Transition] = field(default_factory=set)
    _places: dict[torch.Size, tuple[int, int | None]] = field(default_factory=dict)  # for the present number of rows, by shape
    _numbers: dict[Any, int] = field(default_factory=dict)  # of operations: quicker to compare
    _below: list[TorchFunctionMode] | None = None  # modes that were there when ours was put on top; None while it is not
    _mode: _Follow = field(init=False)

    def __post_init__(self) -> None:
        self._mode = _Follow(self)
        self._known = self._verified["many"]

    @contextmanager
    def function(self) -> Iterator[None]:
        """Follow a whole function, the calls of modules in it included."""
        self._count(None)
        self.unverified, self.draws = set(), self._no_draws()
        self._open(None)
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
            self.close()

    def start(self, name: str, rows: int | None) -> None:
        """Follow an outermost call of a module from now on."""
        self._count(rows)
        self.drawn_inside = self._no_draws()
        if self._whole:
            self.enter(name)
            return
        self.unverified, self.draws = set(), self.drawn_inside
        self._open(name)

    def _no_draws(self) -> Draws:
        return Draws() if self.keeps_generators else Draws(generators=None)

    def _count(self, rows: int | None) -> None:
        if rows != self.rows:
            self.rows, self._places = rows, {}

    def stop(self) -> None:
        """The outermost call is over, or was interrupted."""
        if self._whole:
            del self._frames[1:]
        else:
            self.close()

    def _open(self, frame: str | None) -> None:
        self.close()
        self._frames, self._constants = [[frame, None]], {id(b): b for b in self.buffers()}  # which are others now, it may be
        self._below = _get_current_function_mode_stack()
        _push_mode(self._mode)

    def close(self) -> None:
        """Follow nothing any more."""
        self._frames, self._constants = [], {}
        below, self._below = self._below, None
        if below is None:
            return
        stack = _get_current_function_mode_stack()
        ours: TorchFunctionMode | None = self._mode
        if ours not in stack:
            # A pass was interrupted inside the context of another mode, whose end took ours off in place of its own.
            ours = next((mode for mode in reversed(below) if mode in stack), None)
        if ours is None:
            return
        above: list[Any] = []
        while (top := _get_current_function_mode_stack()[-1]) is not ours:
            _pop_mode()
            above.append(top)
        _pop_mode()
        for mode in reversed(above):
            _push_mode(mode)

    def enter(self, name: str) -> None:
        """A module is called."""
        if self._frames:
            self._frames[-1][1] = self._pass_by(_CALL)[2]
            self._frames.append([name, None])

    def leave(self) -> None:
        """The call of a module ends."""
        if len(self._frames) > 1:
            self._frames.pop()

    def note_draw(self, name: str, out: Any) -> None:
        """Keep in mind what the function ``name`` drew."""
        self.draws.note(name, out, self.rows)
        if self.drawn_inside is not self.draws:
            self.drawn_inside.note(name, out, self.rows)

    def note(self, function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Keep in mind that ``function`` was called, unless all tensors among its arguments are constant; whether they are."""
        if function.made_new:
            return True
        known = self._constants
        first: Any = args[0] if args else None
        is_tensor = isinstance(first, Tensor)
        if not (is_tensor and id(first) not in known) and self._all_constant(args if not kwargs else (*args, *kwargs.values())):
            return True
        if not self._frames:
            return False
        where: Any = None
        if is_tensor and not first.is_nested:
            shape = first.shape
            where = self._places.get(shape) if type(first) in _ORDINARY else None
            if where is None:
                where = self._place(shape)
        sized = function.sized
        named: Any = None if not kwargs else tuple([(key, _kind(value, sized)) for key, value in kwargs.items()])
        if function.mean:
            named = (named, _uneven(args, kwargs or {}, self.rows))
        operation = (function.name, where, named, *_kinds(args, sized))
        number = self._numbers.get(operation)
        if number is None:
            number = self._numbered(operation)
        frame = self._frames[-1]
        transition = (frame[0], frame[1], number)
        if transition not in self._known:
            self.unverified.add(transition)
        frame[1] = number
        if known:
            known.pop(id(first), None)  # it may have been written to
        if kwargs and "out" in kwargs:
            known.pop(id(kwargs["out"]), None)
        return False

    def note_written(self, names: Sequence[str]) -> None:
        """The call that is over wrote to buffers: whether of what is in the samples, a check has to find out."""
        transition = ("", None, ("written", *names))
        if transition not in self._known:
            self.unverified.add(transition)

    def _all_constant(self, args: Iterable[Any]) -> bool:
        known = self._constants
        for arg in args:
            if isinstance(arg, Tensor):
                if id(arg) not in known:
                    return False
            elif isinstance(arg, (tuple, list)) and any(isinstance(t, Tensor) and id(t) not in known for t in arg):
                return False
        return True

    def note_constant(self, function: _Function, args: tuple[Any, ...], out: Any) -> None:
        """Keep in mind that ``out`` was made of constants."""
        if not self._frames:
            return
        made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        self._constants.update((id(t), t) for t in made)
        if any(self.rows in t.shape for t in (*made, *(arg for arg in args if isinstance(arg, Tensor)))):
            # Not what the next operation follows: a cache is there the second time.
            operation = (_CALL, function.name, *(_kind(arg, function.sized) for arg in args))
            self._from_constants.add(self._pass_by(self._numbered(operation)))

    def _place(self, shape: torch.Size) -> tuple[int, int | None]:
        """The number of axes, and the first of them that may count samples."""
        rows = self.rows
        if len(self._places) >= _MOST:
            self._places.clear()
        found = len(shape), shape.index(rows) if rows in shape else self._multiple(shape)
        if all(type(size) is int for size in shape):
            self._places[shape] = found
        return found

    def _multiple(self, shape: torch.Size) -> int | None:
        """The first axis that may hold several rows per sample."""
        rows = self.rows
        return None if not rows else next((i for i, size in enumerate(shape) if size and size % rows == 0), None)

    def _numbered(self, operation: Any) -> int:
        return self._numbers.setdefault(operation, len(self._numbers))

    def _pass_by(self, number: int) -> Transition:
        name, before = self._frames[-1]
        transition = (name, before, number)
        if transition not in self._known:
            self.unverified.add(transition)
        return transition

    def repeatable(self, transitions: set[Transition]) -> set[Transition]:
        """Those of ``transitions`` that a repetition of the pass has to go through; what is constant may be kept from the first."""
        return transitions - self._from_constants

    def unchecked(self, transitions: set[Transition], samples: int) -> set[Transition]:
        """Those of ``transitions`` that no check on as many samples (one, or several) went through."""
        return transitions - self._verified["one" if samples == 1 else "many"]

    def verify(self, transitions: set[Transition], samples: int) -> None:
        """A check on so many samples went through ``transitions``, and found nothing."""
        self._verified["one"] |= transitions
        if samples > 1:
            self._verified["many"] |= transitions

    def verify_alike(self, transitions: set[Transition], samples: int, classes: Mapping[str, type]) -> set[Transition]:
        """Take as verified what a module of the same class went through in a check; return what is left.

        With dropout on, a token may be routed to another expert than in the check.
        """
        known = {(classes.get(name), *rest) for name, *rest in self._verified["one" if samples == 1 else "many"]}
        left = {transition for transition in transitions if (classes.get(transition[0]), *transition[1:]) not in known}
        self.verify(transitions - left, samples)
        return left

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Follow passes of a check: everything they go through is in :attr:`unverified`."""
        self.close()
        kept = (self.rows, self.unverified, self.draws, self._whole)
        self._known, self._whole = set(), False
        try:
            yield
        finally:
            self.close()
            self._known = self._verified["many"]
            rows, self.unverified, self.draws, self._whole = kept
            self._count(rows)
