"""The way to run a model aside: what surrounded a call, and what has to be put back afterwards."""

import copy
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ._no_randomness import other_generators_kept
from ._tree import modules_of


@dataclass(frozen=True)
class AmbientContext:
    """The dtype of autocast on ``device`` (None: off), and the innermost hooks on saved tensors (``save_on_cpu``)."""

    device: str
    autocast: torch.dtype | None
    saving: tuple[Callable[..., Any], Callable[..., Any]] | None

    @classmethod
    def current(cls, device: str) -> "AmbientContext":
        """Those of the present moment."""
        return cls(device, autocast_dtype(device), _innermost_hooks())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The same ones for a block."""
        with autocast_as(self.device, self.autocast):
            if self.saving is None or self.saving == _innermost_hooks():
                yield
            else:
                with torch.autograd.graph.saved_tensors_hooks(*self.saving):
                    yield


def _innermost_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    # Those of checkpointing count what one run saves, which no other run may add to.
    return None if hooks is None or getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint" else hooks


Place = tuple[Any, ...]  # where something is in a module's state: the id of a module, an attribute, and what leads on from there


class ModuleState:
    """The attributes and buffers of a module and its descendants, as they were when this was made.

    Of lists, dictionaries, sets, queues, arrays and objects of other classes that are not long, what was in them is part of it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept = [(m, dict(vars(m)), dict(m._buffers)) for m in modules_of(module)]
        inner = _Inner()
        for m, attributes, buffers in self._kept:
            here = id(m)
            for key, value in attributes.items():
                if key not in OWN and type(value) not in _SIMPLE:
                    inner.visit((here, key), value)
            inner.tensors += [((here, key), t) for key, t in buffers.items() if t is not None]
            inner.tensors += [((here, key), p) for key, p in m._parameters.items() if p is not None and not p.requires_grad]
        self._inner = inner
        self._written = [(place, t, t._version, _address(t)) for place, t in inner.tensors if not t.is_inference()]

    def put_back(self) -> None:
        """Make every one of them the very object again that it was."""
        for m, attributes, buffers in self._kept:
            m._buffers.clear()
            m._buffers.update(buffers)
            now = vars(m)
            if now.keys() != attributes.keys() or any(now[key] is not value for key, value in attributes.items()):
                now.clear()
                now.update(attributes)
        for _, container, before in self._inner.containers:
            if next(_unlike(container, before), None) is not None:
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(before)
        for _, array, before in self._inner.arrays:
            array[...] = before

    def changed(self) -> dict[Place, Place | None]:
        """Places that hold other objects than then, or that were written to; for one that is new, what it was added to."""
        found = {place: holder for place, holder, _ in self._differences()}
        found |= {place: None for place, t, version, at in self._written if t._version != version or _address(t) != at}
        return found | {place: None for place, now, then in self._inner.arrays if not bool(((now == then) | (now != now)).all())}

    def made_since(self) -> list[Tensor]:
        """Tensors with a history that are stored in attributes, or in what these hold, and were not then."""
        found = _Inner()
        for place, _, value in self._differences():
            if len(place) > 2 or place[1][0] != "_" or not isinstance(value, Tensor):
                found.visit(place, value)
        old = {id(t) for _, t in self._inner.tensors}
        return list({id(t): t for _, t in found.tensors if t.grad_fn is not None and id(t) not in old}.values())

    def _differences(self) -> Iterator[tuple[Place, Place | None, Any]]:
        """Where another object is now than then; what it was added to, if nothing was there; and the object."""
        for m, attributes, buffers in self._kept:
            here = id(m)
            for now, then in ((vars(m), attributes), (m._buffers, buffers)):
                for key, value in now.items():
                    if value is not then.get(key, _MISSING) and key not in OWN:
                        yield (here, key), None if key in then else (here,), value
        for place, container, before in self._inner.containers:
            for key, added, value in _unlike(container, before):
                yield (*place, key), place if added else None, value


OWN = frozenset(vars(nn.Module())) | {"__getstate__", "__deepcopy__"}  # attributes that are PyTorch's, or ours
CONTAINERS = (list, tuple, dict, set, deque)
LONGEST = 256  # longer ones are data, and nothing that a forward pass is about
_SIMPLE = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_LARGEST = 65_536  # bytes of an array that is compared by its values
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "dp_hooks"}  # their objects are not looked into
_MISSING = object()


class _Inner:
    """What attributes hold: the contents of containers, objects and arrays, and all tensors, each with its place."""

    def __init__(self) -> None:
        self.containers: list[tuple[Place, Any, Any]] = []  # each with a copy; of objects, the dictionary of their attributes
        self.arrays: list[tuple[Place, Any, Any]] = []
        self.tensors: list[tuple[Place, Tensor]] = []
        self._seen: set[int] = set()

    def visit(self, place: Place, value: Any, *, within: bool = False) -> None:
        """Add ``value``; ``within`` an object, of which others are not looked into."""
        if isinstance(value, Tensor):
            self.tensors.append((place, value))
            return
        if type(value) in _SIMPLE or id(value) in self._seen:
            return
        if is_object(value):
            within, contents = True, None if within else vars(value)
        else:
            contents = value if isinstance(value, CONTAINERS) else None
        if contents is not None and len(contents) <= LONGEST:
            self._seen.add(id(value))
            if not isinstance(contents, tuple):
                self.containers.append((place, contents, copy.copy(contents)))
            for key, item in contents.items() if isinstance(contents, dict) else enumerate(contents):
                if type(item) not in _SIMPLE:
                    self.visit((*place, key), item, within=within)
        elif is_array(value) and type(value).__name__ == "ndarray" and value.nbytes <= _LARGEST:
            self.arrays.append((place, value, value.copy()))


def is_object(value: Any) -> bool:
    """Whether ``value`` is an object of a class of somebody's own that keeps its state in attributes, and no module."""
    if isinstance(value, (nn.Module, Tensor, type, *CONTAINERS)) or not hasattr(value, "__dict__") or callable(value):
        return False
    package = type(value).__module__.partition(".")[0]
    return isinstance(value, SimpleNamespace) or package not in _LIBRARIES


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array or a number of NumPy."""
    return type(value).__module__ == "numpy" and hasattr(value, "dtype")


def _address(tensor: Tensor) -> int:
    """Where its values are: what is set as ``.data`` has the same version."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided else 0


def _unlike(now: Any, then: Any) -> Iterator[tuple[Any, bool, Any]]:
    """Where a container holds another object than its copy; whether it held nothing there; and the object."""
    if isinstance(now, set):
        if now != then:
            yield None, False, list(now)
        return
    if isinstance(now, dict):
        for key, value in now.items():
            if value is not then.get(key, _MISSING):
                yield key, key not in then, value
        if len(now) < len(then) or any(one is not other for one, other in zip(now, then, strict=False)):
            yield None, False, None  # something is gone, or in another order
        return
    for i, (value, before) in enumerate(zip_longest(now, then, fillvalue=_MISSING)):
        if value is not before:
            yield i, before is _MISSING, None if value is _MISSING else value


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put every attribute of ``module`` and its descendants back to the very object it was before the block."""
    before = ModuleState(module)
    try:
        yield
    finally:
        before.put_back()


class _Checks(threading.local):
    running = 0


_checks = _Checks()


def checking() -> bool:
    """Whether the library is running a model or a train function for a check of its own, of which nothing remains.

    A ``@dp_step`` function runs several times at its first step; one that counts or logs can ask here whether to.
    """
    return _checks.running > 0


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave no trace of what is run in the block, with gradients enabled.

    Afterwards attributes, buffers, frozen parameters and gradients of ``model``, what is set on its parameters, and the
    generators of PyTorch, Python and NumPy are as they were.
    """
    params = list(model.parameters())
    values = [(t, copy_of(t)) for t in (*model.buffers(), *(p for p in params if not p.requires_grad))]
    own = [(p, p.grad, dict(vars(p))) for p in params]
    devices = sorted({p.device.index or 0 for p in params if p.device.type == "cuda"})
    _checks.running += 1
    try:
        for p in params:
            p.grad = None  # else gradients would be added to it in place
        with attributes_kept(model), torch.random.fork_rng(devices=devices), other_generators_kept(), torch.enable_grad():
            yield
    finally:
        _checks.running -= 1
        for p, grad, attributes in own:
            p.grad = grad
            vars(p).clear()
            vars(p).update(attributes)
        with torch.no_grad():
            for tensor, value in values:
                write_back(tensor, value)


_copies: "weakref.WeakValueDictionary[int, Tensor]" = weakref.WeakValueDictionary()


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy that nobody writes to: the one made last if ``tensor`` still holds the same, so that many take one's memory.

    To be kept together with ``tensor`` only, by whose identity it is known.
    """
    found = _copies.get(id(tensor))
    if found is None or found.dtype != tensor.dtype or found.device != tensor.device or not same_values(tensor.detach(), found):
        found = _copies[id(tensor)] = tensor.detach().clone()
    return found


def write_back(tensor: Tensor, value: Tensor) -> None:
    """Give ``tensor`` its earlier value, unless it has it: a graph may have saved it, and would notice."""
    if not same_values(tensor, value):
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)
        tensor.copy_(value)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, NaN and all; those without values do."""
    if one.is_meta:
        return True
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.shape != other.shape or torch.equal(one, other):
        return one.shape == other.shape
    if not one.is_floating_point() or one.dtype != other.dtype:
        return False
    kept = (0.0, float("inf"), float("-inf"))
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(*kept), other.nan_to_num(*kept))


def is_copy(tensor: Tensor, original: Tensor) -> bool:
    """Whether ``tensor`` holds what ``original`` holds, on whatever device and in whatever dtype."""
    if tensor.shape != original.shape or tensor.layout != original.layout or tensor.layout != torch.strided:
        return False
    return torch.equal(tensor.detach(), original.detach().to(tensor.device, tensor.dtype))


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast is using on devices of this type, or None while it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off."""
    return autocast_as(device, None) if torch.is_autocast_enabled(device) else nullcontext()


def autocast_as(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """Return a context in which autocast is as :func:`autocast_dtype` found it, without a cache of its own."""
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
