"""CarriedState: what a model carries from one batch to the next, in buffers, frozen parameters and attributes."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._rerun import CONTAINERS, LONGEST, OWN, copy_of, is_array, is_object, same_values, write_back


class CarriedState:
    """Values, as they were when this was made, of all buffers, frozen parameters and attributes of a module and its descendants."""

    def __init__(self, module: nn.Module) -> None:
        """Keep copies; the objects themselves are kept as well, to write into them again."""
        self._stored: dict[str, tuple[Any, Any]] = {}  # by name: an object, and its values
        self._attributes: dict[str, tuple[Any, Any, Callable[[Any], None]]] = {}
        seen: set[int] = set()
        for prefix, m in module.named_modules():
            dot = f"{prefix}." if prefix else ""
            for name, tensor in m._buffers.items():
                if tensor is not None and not (tensor.is_leaf and tensor.requires_grad):
                    self._stored[dot + name] = (tensor, copy_of(tensor))
            for name, param in m._parameters.items():
                if param is not None and not param.requires_grad:
                    self._stored[dot + name] = (param, copy_of(param))
            for place, fields in _holders(m, seen):
                for name, value in fields.items():
                    if name not in OWN and _is_value(value):
                        self._attributes[dot + place + name] = (value, _copied(value), partial(fields.__setitem__, name))

    def put_back(self) -> None:
        """Write all values back."""
        with torch.no_grad():
            for tensor, value in self._stored.values():
                write_back(tensor, value)
            for object_, value, put in self._attributes.values():
                if isinstance(object_, Tensor) and not object_.requires_grad and object_.shape == value.shape:
                    write_back(object_, value)
                    put(object_)
                else:
                    put(_copied(value))

    def stored_unlike(self, other: "CarriedState") -> list[str]:
        """Names of buffers and frozen parameters that hold something else in ``other``."""
        return _unlike({k: v for k, (_, v) in self._stored.items()}, {k: v for k, (_, v) in other._stored.items()})

    def attributes_unlike(self, other: "CarriedState") -> list[str]:
        """Names of attributes that hold something else in ``other``, or are in one of them only."""
        return _unlike({k: v[1] for k, v in self._attributes.items()}, {k: v[1] for k, v in other._attributes.items()})


def _holders(module: nn.Module, seen: set[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The attributes of a module, and of the objects that these are, or that are in a list or dictionary of them; each once."""
    yield "", vars(module)
    for name, value in vars(module).items():
        if name in OWN:
            continue
        candidates = [(name, value)]
        if isinstance(value, (list, tuple, dict)) and len(value) <= LONGEST:
            candidates = [(f"{name}[{key!r}]", v) for key, v in (value.items() if isinstance(value, dict) else enumerate(value))]
        for place, one in candidates:
            if is_object(one) and id(one) not in seen and len(vars(one)) <= LONGEST:
                seen.add(id(one))
                yield f"{place}.", vars(one)


def _unlike(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if name not in one or name not in other or not _alike(one[name], other[name])]


def _is_value(value: Any) -> bool:
    if isinstance(value, CONTAINERS):  # recurrent layers keep a list of their parameters, which is none
        items = list(value.values() if isinstance(value, dict) else value)
        return len(items) <= LONGEST and (not items or any(_is_value(item) for item in items))
    if isinstance(value, Tensor):  # what is trained is no state
        return not isinstance(value, nn.Parameter) and not (value.is_leaf and value.requires_grad)
    return isinstance(value, (int, float, complex, str, type(None))) or is_array(value)


def _copied(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()} if type(value) is dict else copy.copy(value)
    if isinstance(value, deque):
        return deque((_copied(item) for item in value), value.maxlen)
    if type(value) in (list, tuple, set):
        return type(value)(_copied(item) for item in value)
    return copy.copy(value) if isinstance(value, CONTAINERS) or is_array(value) else value


def _alike(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, nn.Parameter):
        return True  # those that train are no state, and others are kept as such
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and same_values(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(_alike(a, b) for a, b in zip(one, other, strict=True))
    if is_array(one):
        return bool(one.shape == other.shape and (one == other).all())
    if isinstance(one, (int, float, complex, str, set)):
        return bool(one == other) or (one != one and other != other)
    return True  # objects of other classes: not known
