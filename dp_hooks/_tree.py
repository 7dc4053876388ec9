"""Walk nested batches, arguments and outputs: tuples, lists, mappings, dataclasses and the tensors in them."""

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils.rnn import PackedSequence

Leaf = Callable[..., Any]

# Asked first: what is no container by its class alone, and the containers that nearly all are.
_LEAVES = (Tensor, int, float, str, type(None))
_PLAIN = (tuple, list, dict)


def _is_node(value: object) -> bool:
    if type(value) in _PLAIN:
        return True
    if isinstance(value, _LEAVES):
        return False
    if isinstance(value, PackedSequence):  # checks what is put into it, and has no sample axis
        return False
    return isinstance(value, (tuple, list, Mapping)) or (dataclasses.is_dataclass(value) and not isinstance(value, (type, _Slot)))


def tree_map(fn: Leaf, tree: Any, *others: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return ``tree`` with every leaf ``x`` replaced by ``fn(x, *matching leaves of others)``.

    A ``PackedSequence`` is a leaf. Containers keep their type: tuples, named tuples, lists, mappings of any class
    (``dict``, ``UserDict``, ``BatchEncoding``, ``ModelOutput``) and dataclasses. ``others`` must have the structure of
    ``tree``. Lists whose lengths differ between the trees are handed to ``fn`` whole, as leaves; so is, of ``tree``, whatever
    ``is_leaf`` says.
    """
    if not _is_node(tree) or (is_leaf is not None and is_leaf(tree)):
        return fn(tree, *others)
    if isinstance(tree, (tuple, list)):
        if any(len(other) != len(tree) for other in others):
            return fn(tree, *others)
        items = [tree_map(fn, item, *(other[i] for other in others), is_leaf=is_leaf) for i, item in enumerate(tree)]
        if type(tree) is list:
            return items
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, Mapping):
        changed = {key: tree_map(fn, value, *(other[key] for other in others), is_leaf=is_leaf) for key, value in tree.items()}
        if type(tree) is dict:
            return changed
        if hasattr(tree, "__setitem__"):
            clone = copy.copy(tree)
            for key, value in changed.items():
                clone[key] = value
            return clone
        return type(tree)(changed)  # type: ignore[call-arg]
    clone = copy.copy(tree)
    for field in dataclasses.fields(tree):
        value = tree_map(fn, getattr(tree, field.name), *(getattr(other, field.name) for other in others), is_leaf=is_leaf)
        object.__setattr__(clone, field.name, value)
    return clone


def attributes_of(leaf: Any) -> dict[str, Any]:
    """The attributes of an object with tensors or arrays among them, as classes for batches have; of anything else none."""
    if isinstance(leaf, (*_LEAVES, Module, type)) or callable(leaf) or _is_node(leaf):
        return {}
    attributes = dict(getattr(leaf, "__dict__", {}))
    return attributes if tensors_of(attributes) or any(map(is_array, attributes.values())) else {}


def with_attributes(leaf: Any, attributes: dict[str, Any]) -> Any:
    """Return a copy of an object with other attributes."""
    clone = copy.copy(leaf)
    vars(clone).update(attributes)
    return clone


def is_array(value: Any) -> bool:
    """Whether it is a NumPy array with axes."""
    return type(value).__module__ == "numpy" and getattr(value, "shape", ()) != ()


def modules_of(model: Module) -> list[Module]:
    """Return ``model`` and all its descendants, each once: quicker than ``model.modules()``, which makes their names on the way."""
    found, seen = [model], {id(model)}
    for module in found:  # which grows
        if children := module._modules:
            for child in children.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    found.append(child)
    return found


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors of ``tree`` in the order in which ``tree_map`` visits them."""
    if _is_lone(tree):
        return [tree[0][0]]
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def differentiable(tree: Any) -> list[Tensor]:
    """Return those tensors of ``tree`` that gradients can flow to."""
    return [t for t in tensors_of(tree) if t.is_floating_point() or t.is_complex()]


def outputs_of(tree: Any) -> list[Tensor]:
    """Return the tensors of what a model returned, also those that are attributes of an object in it, of any class."""
    found: list[Tensor] = []

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, Module)) and not callable(leaf):
            _collect(dict(vars(leaf)), found)
        return leaf

    if isinstance(tree, Tensor):
        return [tree]
    tree_map(visit, tree)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    else:
        for part in parts_of(tree):
            _collect(part, found)


def parts_of(tree: Any) -> Iterable[Any]:
    """Return what is directly in a container; nothing of a leaf."""
    if not _is_node(tree):
        return ()
    if isinstance(tree, (tuple, list)):
        return tree
    return tree.values() if isinstance(tree, Mapping) else [getattr(tree, field.name) for field in dataclasses.fields(tree)]


@dataclasses.dataclass(frozen=True)
class _Slot:
    index: int


_LONE: Any = ((_Slot(0),), {})


def _is_lone(tree: Any) -> bool:
    """Whether ``tree`` is ``((tensor,), {})``, the arguments that most modules are called with: worth a shorter way."""
    return (
        type(tree) is tuple
        and len(tree) == 2
        and type(tree[0]) is tuple
        and len(tree[0]) == 1
        and isinstance(tree[0][0], Tensor)
        and type(tree[1]) is dict
        and not tree[1]
    )


def split(tree: Any) -> tuple[Any, list[Tensor]]:
    """Take the tensors out of ``tree``: return a skeleton that holds none of them, and the tensors in order."""
    if _is_lone(tree):
        return _LONE, [tree[0][0]]
    tensors: list[Tensor] = []

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return _Slot(len(tensors) - 1)

    return tree_map(take, tree), tensors


def join(skeleton: Any, tensors: list[Tensor]) -> Any:
    """Put ``tensors`` back into a ``skeleton`` made by :func:`split`."""
    if skeleton is _LONE:
        return (tensors[0],), {}
    return tree_map(lambda leaf: tensors[leaf.index] if isinstance(leaf, _Slot) else leaf, skeleton)


@dataclasses.dataclass(frozen=True)
class PaddedField:
    """A field of batches that is as long as the longest example in them."""

    path: tuple[Any, ...]
    axis: int  # of one row
    at_end: bool  # where the padding is
    value: float | None  # what it is filled with; None: it is not one number


def field_at(batch: Any, path: Iterable[Any]) -> Any:
    """Return what is in ``batch`` under these keys, attributes and positions, one after the other; None if there is nothing."""
    for key in path:
        try:
            batch = (attributes_of(batch) or batch)[key]
        except (KeyError, IndexError, TypeError):
            return None
    return batch


def as_real(tensor: Tensor) -> Tensor:
    """Return real and imaginary parts along a further axis, of a complex tensor; else the tensor itself."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def private_copy(tree: Any) -> Any:
    """Return ``tree`` with containers and tensors of its own."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def rows_of(batch: Any, rows: Tensor, samples: int, axis: int) -> Any:
    """Return some samples of ``batch``: whatever counts ``samples`` along ``axis`` is cut to ``rows``."""
    if len(rows) == 1:
        return one_sample(batch, int(rows[0]), samples, axis)
    return _cut(batch, {samples}, axis, lambda leaf: leaf.index_select(axis, rows.to(leaf.device)))


def one_sample(batch: Any, i: int, samples: int, axis: int, tokens: int = 1) -> Any:
    """Return sample ``i`` of ``batch`` as a batch of one: whatever counts ``samples`` along ``axis`` is cut.

    With ``tokens`` also what counts so many of each sample, one after the other.
    """

    def take(leaf: Tensor) -> Tensor:
        count = leaf.shape[axis] // samples
        return leaf.narrow(axis, i * count, count)

    return _cut(batch, {samples, samples * tokens}, axis, take)


def _cut(batch: Any, sizes: Collection[int], axis: int, take: Callable[[Tensor], Tensor]) -> Any:
    def cut(leaf: Any) -> Any:
        counts = isinstance(leaf, Tensor) and leaf.dim() > axis and leaf.shape[axis] in sizes
        return take(leaf) if counts else leaf

    return tree_map(cut, batch)


def names_of_parameters(model: Module) -> dict[Parameter, list[str]]:
    """Return the qualified names of every parameter, several if it is shared."""
    names: dict[Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return names
