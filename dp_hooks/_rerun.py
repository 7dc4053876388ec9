"""The way to run a model aside: what surrounded a call, and what has to be put back afterwards."""

import copy
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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


class ModuleState:
    """The attributes and buffers of a module and its descendants, as they were when this was made.

    Of lists, dictionaries, sets and queues that are not long, what was in them is part of it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept = [(m, dict(vars(m)), dict(m._buffers)) for m in modules_of(module)]
        self._contents = [(value, copy.copy(value)) for _, attributes, _ in self._kept for value in _containers(attributes)]
        tensors = (t for _, *held in self._kept for part in held for t in part.values() if isinstance(t, Tensor))
        self._versions = [(t, t._version) for t in tensors if not t.is_inference()]

    def put_back(self) -> None:
        """Make every one of them the very object again that it was."""
        for m, attributes, buffers in self._kept:
            m._buffers.clear()
            m._buffers.update(buffers)
            now = vars(m)
            if now.keys() != attributes.keys() or any(now[key] is not value for key, value in attributes.items()):
                now.clear()
                now.update(attributes)
        for container, before in self._contents:
            if _same_contents(container, before):
                continue
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(before)

    def changed(self) -> set[tuple[int, str]]:
        """Attributes and buffers, by module and name, that are other objects than then, or were written to."""
        written = {id(t) for t, version in self._versions if t._version != version}
        written |= {id(value) for value, before in self._contents if not _same_contents(value, before)}
        found = set()
        for m, attributes, buffers in self._kept:
            for now, then in ((vars(m), attributes), (m._buffers, buffers)):
                found |= {(id(m), key) for key, value in now.items() if value is not then.get(key) and key not in OWN}
                found |= {(id(m), key) for key, value in then.items() if id(value) in written} if written else set()
        return found

    def made_since(self) -> list[Tensor]:
        """Tensors with a history that are stored in attributes, or in such containers, and were not then."""
        old = {id(t) for _, before in self._contents for t in _items(before)}
        found: list[Tensor] = []
        for m, attributes, _ in self._kept:
            for key, value in vars(m).items():
                if key[0] != "_" and attributes.get(key) is not value and isinstance(value, Tensor):
                    found.append(value)
            for container in _containers(vars(m)):
                found += [t for t in _items(container) if isinstance(t, Tensor) and id(t) not in old]
        return list({id(t): t for t in found if t.grad_fn is not None}.values())


OWN = frozenset(vars(nn.Module())) | {"__getstate__", "__deepcopy__"}  # attributes that are PyTorch's, or ours
_CONTAINERS = (list, dict, set, deque)
_LONGEST = 64  # longer ones are data, and nothing that a forward pass is about


def _containers(attributes: dict[str, Any]) -> list[Any]:
    return [
        value for key, value in attributes.items() if key not in OWN and isinstance(value, _CONTAINERS) and len(value) <= _LONGEST
    ]


def _items(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _same_contents(one: Any, other: Any) -> bool:
    if len(one) != len(other) or (isinstance(one, dict) and list(one) != list(other)):
        return False
    if isinstance(one, set):
        return bool(one == other)
    return all(a is b for a, b in zip(_items(one), _items(other), strict=True))


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
