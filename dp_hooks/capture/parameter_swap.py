"""The places in a module where its parameters are stored, to put other tensors there for a while and back again."""

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_RNN_LISTS = ("_flat_weights", "_flat_weight_refs")


@dataclass(eq=False)
class ParameterSwap:
    """The trainable parameters of ``module`` (with ``recurse`` also of its descendants) and where they are stored.

    Parameters are known by module and name as found when the places were made. ``put`` and ``restore`` write to the modules'
    parameter dictionaries directly: no ``setattr`` runs, ``requires_grad`` never changes, and after ``restore``
    the very same objects are in place.
    """

    module: nn.Module
    recurse: bool
    params: dict[str, nn.Parameter] = field(init=False)
    swapped: bool = field(default=False, init=False)
    places: list[tuple[nn.Module, str, str]] = field(init=False)
    _lists: list[tuple[nn.RNNBase, dict[str, Any]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Find the places."""
        self.params, self.places = {}, []
        seen: dict[int, str] = {}
        for prefix, owner in self.module.named_modules() if self.recurse else [("", self.module)]:
            for key, param in owner._parameters.items():
                if param is None or not param.requires_grad:
                    continue
                name = seen.setdefault(id(param), f"{prefix}.{key}" if prefix else key)
                self.params.setdefault(name, param)
                self.places.append((owner, key, name))

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Store ``tensors[name]`` wherever the parameter ``name`` was."""
        if self.swapped:
            self.restore()
        self.swapped = True
        for owner, key, name in self.places:
            owner._parameters[key] = tensors[name]  # type: ignore[assignment]
        for owner in {id(o): o for o, _, _ in self.places}.values():
            # Recurrent layers notice in forward that their weights changed, and renew a second list of them.
            if isinstance(owner, nn.RNNBase):
                self._lists.append((owner, {key: vars(owner)[key] for key in _RNN_LISTS if key in vars(owner)}))

    def foreign(self) -> list[str]:
        """Names of the places that hold something else than the parameter found when the places were made."""
        return [name for owner, key, name in self.places if owner._parameters.get(key) is not self.params[name]]

    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that require a gradient now."""
        with torch._C.DisableTorchFunction():  # quick, also while operations are followed
            return tuple(name for name, p in self.params.items() if p.requires_grad)

    def detach(self) -> None:
        """Store the parameters' detached selves, so that autograd computes no gradient for them."""
        with torch._C.DisableTorchFunction():
            self.put({name: param.detach() for name, param in self.params.items()})

    def restore(self) -> None:
        """Put the parameters back; harmless if they are in place."""
        for owner, key, name in self.places:
            owner._parameters[key] = self.params[name]
        while self._lists:
            owner, lists = self._lists.pop()
            vars(owner).update(lists)
        self.swapped = False


class ModuleState:
    """The attributes and buffers of a module and its descendants, as they were when this was made.

    Of lists, dictionaries, sets and queues that are not long, what was in them is part of it.
    """

    def __init__(self, module: nn.Module) -> None:
        """Keep them."""
        self._kept = [(m, dict(vars(m)), dict(m._buffers)) for m in module.modules()]
        self._contents = [
            (value, copy.copy(value)) for _, attributes, _ in self._kept for value in _containers(attributes)
        ]

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


_CONTAINERS = (list, dict, set, deque)
# Longer ones are data, and nothing that a forward pass is about.
_LONGEST = 64


def _containers(attributes: dict[str, Any]) -> list[Any]:
    return [
        value
        for key, value in attributes.items()
        if key[0] != "_" and isinstance(value, _CONTAINERS) and len(value) <= _LONGEST
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


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast is using on devices of this type, or None while it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_as(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """Return a context in which autocast is as :func:`autocast_dtype` found it, without a cache of its own."""
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
