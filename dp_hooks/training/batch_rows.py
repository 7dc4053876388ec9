"""The batch of a train function, of any structure: as it is for all of its examples, or for some."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._tree import attributes_of, is_array, parts_of, tree_map, with_attributes

_PLAIN = (int, float, complex, str, bytes, type(None))


def copy_of_batch(batch: Any, *, tensors: bool = True) -> Any:
    """Return ``batch`` with containers, and with ``tensors`` also tensors and arrays, of its own: a function may consume them."""
    return _mapped(_copied if tensors else lambda leaf: leaf, batch)


def rows_of_batch(batch: Any, rows: Tensor, samples: int, axis: int) -> Any:
    """Return a copy of some of the ``samples`` of ``batch``.

    Whatever has so many rows is cut, in attributes of objects as well: tensors, NumPy arrays, and lists and tuples in whose
    entries there is nothing to cut.
    """
    chosen = rows.tolist()

    def counts(value: Any) -> bool:
        if isinstance(value, Tensor) or is_array(value):
            return len(value.shape) > axis and bool(value.shape[axis] == samples)
        return any(map(counts, parts_of(value))) or _entries(value) == samples

    def has_entries(value: Any) -> bool:
        return _entries(value) == samples and not any(counts(part) or counts(attributes_of(part)) for part in value)

    def cut(leaf: Any) -> Any:
        if has_entries(leaf):
            return type(leaf)(copy_of_batch(leaf[i]) for i in chosen)
        if not counts(leaf):
            return _copied(leaf)
        return leaf.detach().index_select(axis, rows.to(leaf.device)) if isinstance(leaf, Tensor) else leaf.take(chosen, axis)

    return _mapped(cut, batch, is_leaf=has_entries)


def not_looked_into(batch: Any) -> set[str]:
    """Return the classes of objects in ``batch`` that may hold something of its examples, which is not cut."""
    found: set[str] = set()

    def look(leaf: Any) -> None:
        if not (isinstance(leaf, (Tensor, *_PLAIN)) or is_array(leaf) or attributes_of(leaf)):
            found.add(type(leaf).__name__)

    tree_map(look, batch)
    return found


def _mapped(fn: Callable[[Any], Any], batch: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """``tree_map``, which goes into the attributes of objects, but not into objects there: these may hold all the data."""

    def visit(leaf: Any) -> Any:
        attributes = attributes_of(leaf)
        return with_attributes(leaf, tree_map(fn, attributes, is_leaf=is_leaf)) if attributes else fn(leaf)

    return tree_map(visit, batch, is_leaf=is_leaf)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf.copy() if is_array(leaf) else leaf


def _entries(value: Any) -> int | None:
    """How many entries a list or tuple has; None for a named tuple, and anything else."""
    return len(value) if isinstance(value, (list, tuple)) and not hasattr(value, "_fields") else None
