"""Lent: arguments in which some tensors stand for others, handed to a function that may write into their containers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .._tree import tree_map


def can_be_lent(arguments: Any) -> bool:
    """Whether what is written into a copy of ``arguments`` can be written into them: no fields of objects, no container twice."""
    seen: set[int] = set()

    def lends(tree: Any) -> bool:
        if isinstance(tree, (list, Mapping)):
            if id(tree) in seen:
                return False
            seen.add(id(tree))
            return all(map(lends, tree.values() if isinstance(tree, Mapping) else tree))
        if isinstance(tree, tuple):
            return all(map(lends, tree))
        return not dataclasses.is_dataclass(tree) or isinstance(tree, type)

    return lends(arguments)


class Lent:
    """A copy of nested arguments with other tensors in it; what is written into its containers reaches the caller's, too.

    Attributes:
        copy: what to hand over.
    """

    def __init__(self, arguments: Any, stand_in: Callable[[Tensor], Tensor]) -> None:
        """Copy ``arguments`` with ``stand_in(t)`` for every tensor ``t``."""
        self._own: dict[int, Any] = {}  # what the caller has for a tensor or container of the copy
        self._held: list[Any] = []  # or the numbers could be those of other objects later

        def exchanged(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            other = stand_in(leaf)
            self._own[id(other)] = leaf
            self._held.append(other)
            return other

        self.copy = tree_map(exchanged, arguments)
        self._containers = [(own, lent, _contents(lent)) for own, lent in _pairs(arguments, self.copy)]
        self._own |= {id(lent): own for own, lent, _ in self._containers}

    def write_back(self) -> list[Tensor]:
        """Do to the caller's containers what was done to the copies: items set, deleted, or put in another order.

        Returns:
            Tensors with a history that were put there: what the caller does with them is not seen.
        """
        now_there = [value for _, lent, _ in self._containers for value in _contents(lent).values()]
        made = [t for t in now_there if isinstance(t, Tensor) and t.grad_fn is not None and id(t) not in self._own]
        for own, lent, before in self._containers:
            now = _contents(lent)
            in_order = list(now) == list(before)
            if in_order and all(value is before[key] for key, value in now.items()):
                continue
            if isinstance(own, list):
                own[:] = [self._own.get(id(value), value) for value in lent]
                continue
            for key in before.keys() if not in_order else ():
                own.pop(key, None)
            for key, value in now.items():
                if not in_order or value is not before[key]:
                    own[key] = self._own.get(id(value), value)
        return made


def _contents(container: Any) -> dict[Any, Any]:
    return dict(enumerate(container)) if isinstance(container, list) else dict(container)


def _pairs(tree: Any, copied: Any) -> Iterator[tuple[Any, Any]]:
    """The lists and mappings in ``tree`` that can be written into, each with its copy."""
    parts: list[tuple[Any, Any]] = []
    if isinstance(tree, (tuple, list)) and isinstance(copied, (tuple, list)):
        parts = list(zip(tree, copied, strict=True))
    elif isinstance(tree, Mapping):
        parts = [(value, copied[key]) for key, value in tree.items()]
    if isinstance(tree, list) or (isinstance(tree, Mapping) and hasattr(tree, "__setitem__")):
        yield tree, copied
    for one, other in parts:
        yield from _pairs(one, other)
