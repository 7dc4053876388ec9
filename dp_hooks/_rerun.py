"""The way to run a model aside: what surrounded a call, and what has to be put back afterwards."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._tree import as_real


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


class _Checks(threading.local):
    running = 0


_checks = _Checks()


def checking() -> bool:
    """Whether the library is running a model or a train function for a check of its own, of which nothing remains.

    A ``@dp_step`` function runs several times at its first step; one that counts or logs can ask here whether to.
    """
    return _checks.running > 0


@contextmanager
def as_check() -> Iterator[None]:
    """:func:`checking` is true in the block."""
    _checks.running += 1
    try:
        yield
    finally:
        _checks.running -= 1


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
    """Whether two tensors hold the same, NaN and all; those without values, and nested ones, are taken to."""
    if one.is_meta or one.is_nested:
        return True
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.is_floating_point() and one.itemsize == 1 and one.dtype == other.dtype:  # nothing can be asked about them
        one, other = one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    elif one.dtype == torch.complex32:
        one, other = as_real(one), as_real(other.to(one.dtype))
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
