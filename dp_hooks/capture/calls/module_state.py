"""ModuleState: all that a model holds besides what is trained, by identity: to notice changes, and to put everything back."""

import copy
import math
import operator
import sys
import sysconfig
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._rerun import same_values
from ..._tree import modules_of

Place = tuple[Any, ...]  # where something is: the id of a module, an attribute, and the keys and fields that lead on from there

OWN = frozenset(vars(nn.Module())) | {"__getstate__", "__deepcopy__"}  # attributes that are PyTorch's, or ours
# What is there or is not: nothing is inside.
SIMPLE = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_CONTAINERS = (list, tuple, dict, set, deque)
_LONGEST = 256  # longer containers are data, and nothing that a forward pass is about
_DEEPEST, _OBJECTS = 12, 3  # of places; and how many objects are looked into one in the other
# How much is looked into, in all: a container or tensor counts as so many items, an array as one for every 64 bytes.
_MOST, _EACH = 8192, 8
_LARGEST = 65_536  # bytes of an array that is compared by its values
_MISSING = object()
_WRITTEN = "written to"  # at the end of a place: the tensor there is the same, and what is in it may not be
_ADDRESSED = frozenset((Tensor, nn.Parameter))


class _Held(NamedTuple):
    """What one module holds."""

    attributes: dict[str, Any]
    buffers: dict[str, Tensor | None]
    hooks: dict[int, Any]
    pre_hooks: dict[int, Any]

    @classmethod
    def by(cls, module: nn.Module) -> "_Held":
        return cls(dict(vars(module)), dict(module._buffers), dict(module._forward_hooks), dict(module._forward_pre_hooks))

    def put_back(self, module: nn.Module, only: Collection[str] | None) -> None:
        """All, or ``only`` some attributes and buffers."""
        now = vars(module)
        if only is not None:
            now.update({key: self.attributes[key] for key in only if key in self.attributes})
            module._buffers.update({key: self.buffers[key] for key in only if key in self.buffers})
            return
        module._buffers.clear()
        module._buffers.update(self.buffers)
        if now.keys() != self.attributes.keys() or any(now[key] is not value for key, value in self.attributes.items()):
            now.clear()
            now.update(self.attributes)
        self._put_hooks_back(module)

    def _put_hooks_back(self, module: nn.Module) -> None:
        """Take away hooks that a run has put there (transformers does, to collect hidden states), and put back what it took."""
        for now, then in ((module._forward_hooks, self.hooks), (module._forward_pre_hooks, self.pre_hooks)):
            if now.keys() != then.keys():
                new = now.keys() - then.keys()
                now.clear()
                now.update(then)
                for options in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
                    for number in new:
                        getattr(module, options).pop(number, None)


class ModuleState:
    """Attributes, buffers, frozen parameters and forward hooks of a module, as they were when this was made.

    Modules inside it belong to it, also such that are hidden in lists and objects. Of containers, arrays and objects of somebody's
    own classes that are not long, what was in them is part of it.

    Attributes:
        modules: each with its attributes, its buffers, and its forward hooks and pre-hooks then.
        containers: where they are, the dictionaries of objects' attributes included, each with a copy.
        arrays: those of NumPy that can be written to, likewise.
        tensors: all that are no trained parameters, with their places.
        found_at: where modules are that are not registered, by id.
        differs: whether :meth:`changed` found that something is another object, or gone, when it was asked last.
    """

    def __init__(self, module: nn.Module, *, whole: bool = False, renewable: bool = False) -> None:
        """Look through ``module``; the ``whole`` of it, which takes time, also where there is much.

        With ``renewable`` what :meth:`renewed` needs is kept as well.
        """
        self.differs = True
        self._as_one: tuple[list[nn.Module], _Contents, _Contents] | None = None
        self._longest: float = math.inf if whole else _LONGEST
        self._largest: float = math.inf if whole else _LARGEST
        self.modules: list[tuple[nn.Module, _Held]] = []
        self.containers: list[tuple[Place, Any, Any]] = []
        self.arrays: list[tuple[Place, Any, Any]] = []
        self.tensors: list[tuple[Place, Tensor]] = []
        self.found_at: dict[int, Place] = {}
        self._left: float = math.inf if whole else _MOST
        registered = modules_of(module)
        self._seen = {id(m) for m in registered}
        self._waiting = registered
        self._visited: list[tuple[Any, type]] = []  # what is no tensor, with its class
        self._objects: list[tuple[Any, dict[str, Any]]] = []  # each with its attributes
        self._passed_over: list[Any] = []  # containers too long to be looked into, and arrays that are not kept
        trained: list[tuple[Place, Tensor]] = []
        for m in self._waiting:  # which grows
            here, held = id(m), _Held.by(m)
            self.modules.append((m, held))
            for key, value in held.attributes.items():
                if type(value) not in SIMPLE and key not in OWN:
                    self._visit((here, key), value)
            self.tensors += [((here, key), t) for key, t in m._buffers.items() if t is not None]
            for key, param in m._parameters.items():
                if param is not None:
                    (trained if param.requires_grad else self.tensors).append(((here, key), param))
        every = (*self.tensors, *trained)
        self._counted = [(place, t) for place, t in every if not t.is_inference()]
        # Those made in inference mode do not count how often they were written to.
        self._by_value = [(place, t, t.clone()) for place, t in every if t.is_inference() and t.nbytes <= _LARGEST]
        self._written = _writes(self._counted)
        self._inside: list[dict[str, Any]] = []
        if renewable:
            self._trainable = [t.requires_grad for _, t in self._counted]
            # Registered things, as far as the dictionaries that hold them are what they were: attributes tell.
            for m, _ in self.modules:
                self._inside += (m._parameters, m._modules, m._forward_hooks, m._forward_pre_hooks)  # type: ignore[arg-type]
            self._of_inside = _Contents(self._inside)

    def renewed(self) -> "ModuleState":
        """What would be found if the whole were looked through now: quicker where nothing is another object than then."""
        if not self._is_as_then():
            return ModuleState(self.modules[0][0], whole=self._longest == math.inf, renewable=True)
        new = copy.copy(self)
        new.differs = True
        new.arrays = [(place, array, array.copy()) for place, array, _ in self.arrays]
        new._by_value = [(place, t, t.clone()) for place, t, _ in self._by_value]
        new._written = _writes(self._counted)
        return new

    def _is_as_then(self) -> bool:
        """Whether one looking through everything would come to the same objects, and look into the same of them."""
        return (
            self._same_attributes()
            and self._of_inside.are_in(self._inside)
            and all(_is_same(container, before) for _, container, before in self.containers)
            and all({*map(id, now)} == {*map(id, then)} for _, now, then in self.containers if isinstance(now, set))
            and all(type(value) is kind for value, kind in self._visited)
            and all(object.__getattribute__(value, "__dict__") is contents for value, contents in self._objects)
            and not any(map(self._looks_into, self._passed_over))
            and all(self._looks_into(array) and array.nbytes == before.nbytes for _, array, before in self.arrays)
            and [t.requires_grad for _, t in self._counted] == self._trainable
        )

    def _same_attributes(self) -> bool:
        """Whether the attributes and buffers of modules are the very objects that they were."""
        modules, attributes, buffers = self._attributes
        return attributes.are_in([*map(vars, modules)]) and buffers.are_in([m._buffers for m in modules])

    @property
    def _attributes(self) -> "tuple[list[nn.Module], _Contents, _Contents]":
        """The modules, and their attributes and buffers then; put together when they are first asked for."""
        if self._as_one is None:
            held = [held for _, held in self.modules]
            of_buffers = _Contents([h.buffers for h in held])
            self._as_one = [m for m, _ in self.modules], _Contents([h.attributes for h in held]), of_buffers
        return self._as_one

    def _looks_into(self, value: Any) -> bool:
        """Whether a container is short enough, or an array of those that are kept."""
        if isinstance(value, _CONTAINERS):
            return len(value) <= self._longest
        kept = value.nbytes <= self._largest and value.flags.writeable
        return kept and value.dtype.kind in "biufcmMSUV" and not value.dtype.hasobject

    def _visit(self, place: Place, value: Any, within: int = 0) -> None:
        """Add ``value``; ``within`` so many objects."""
        kind = type(value)
        if issubclass(kind, Tensor):
            self._left -= _EACH
            if self._left > 0 or len(place) == 2:
                self.tensors.append((place, value))
            return
        if id(value) in self._seen or self._left <= 0 or len(place) > _DEEPEST:
            return
        self._visited.append((value, kind))
        if issubclass(kind, nn.Module):
            hidden = [m for m in modules_of(value) if id(m) not in self._seen]
            self._seen.update(map(id, hidden))
            self.found_at.update({id(m): place for m in hidden})
            self._waiting += hidden
            return
        if issubclass(kind, _CONTAINERS):
            contents = value
        elif within < _OBJECTS and _is_object(kind):
            within, contents = within + 1, object.__getattribute__(value, "__dict__")
            self._objects.append((value, contents))
        else:
            if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
                self._add_array(place, value)
            return
        if len(contents) <= self._longest:
            self._seen.add(id(value))
            self._left -= _EACH + len(contents)
            if not isinstance(contents, tuple):
                self.containers.append((place, contents, _copied(contents)))
            for key, item in _items(contents):
                if type(item) not in SIMPLE:
                    self._visit((*place, key), item, within)
        else:
            self._passed_over.append(contents)

    def _add_array(self, place: Place, array: Any) -> None:
        if not self._looks_into(array):
            self._passed_over.append(array)
            return
        self._left -= _EACH + array.nbytes // 64
        if self._left > 0:
            self.arrays.append((place, array, array.copy()))

    def put_back(self, only: Collection[Place] | None = None) -> None:
        """Make every one of them the very object again that it was, and what was in it; or ``only`` some attributes."""
        for m, held in self.modules:
            held.put_back(m, None if only is None else [key for number, key in only if number == id(m)])
        for place, container, before in self.containers:
            if (only is None or place[:2] in only) and not _is_same(container, before):
                _refill(container, before)
        for place, array, before in self.arrays:
            if only is None or place[:2] in only:
                if array.shape != before.shape:
                    array.resize(before.shape, refcheck=False)
                array[...] = before

    def put(self, place: Place, value: Any) -> None:
        """Put ``value`` into a place, unless that is in a set; tuples around it are made anew."""
        number, *keys = place
        m = next(m for m, _ in self.modules if id(m) == number)
        holders: list[Any] = [m._buffers if keys[0] in m._buffers else vars(m)]
        for key in keys[:-1]:
            held = holders[-1][key]
            holders.append(held if isinstance(held, _CONTAINERS) else vars(held))
        while isinstance(holders[-1], tuple):
            items = list(held := holders.pop())
            items[keys.pop()] = value
            value = type(held)(*items) if hasattr(held, "_fields") else type(held)(items)
        if not isinstance(holders[-1], set):
            holders[-1][keys[-1]] = value

    def now(self) -> "ModuleState":
        """The same, with what is there at present."""
        other = copy.copy(self)
        other.modules, other._as_one = [(m, _Held.by(m)) for m, _ in self.modules], None
        other.containers = [(place, container, _copied(container)) for place, container, _ in self.containers]
        other.arrays = [(place, array, array.copy()) for place, array, _ in self.arrays]
        return other

    def changed(self) -> dict[Place, Place | None]:
        """Places that hold other objects than then, or that were written to; for one that is new, what it was added to.

        Trained parameters are among them, which a forward pass has nothing to write to.
        """
        same = self._same_attributes()
        found = {place: holder for place, holder, _ in self._differences(same)}
        self.differs = bool(found) or not same
        # Something else than another object in its place, and looked at by itself.
        now = _writes(self._counted)
        written = []
        if now != self._written:
            written = [place for (place, _), one, other in zip(self._counted, now, self._written, strict=True) if one != other]
        written += [place for place, t, before in self._by_value if not same_values(t, before)]
        found |= {(*place, _WRITTEN): None for place in written}
        return found | {place: None for place, now, then in self.arrays if not same_array(now, then)}

    @property
    def holds_graphs(self) -> bool:
        """Whether a tensor with a history is in it."""
        return any(t.grad_fn is not None for _, t in self.tensors)

    def made_since(self, *, hidden: bool = False) -> list[Tensor]:
        """Tensors with a history that are stored in attributes, or in what these hold, and were not then.

        Args:
            hidden: also in attributes whose names begin with an underscore, and what was written into tensors that were there.
        """
        found = copy.copy(self)
        found.tensors, found.containers, found.arrays, found.found_at = [], [], [], {}
        found._seen, found._left, found._waiting = set(), _MOST, []
        found._visited, found._objects, found._passed_over = [], [], []
        for place, _, value in self._differences(self._same_attributes()):
            if (hidden or len(place) > 2 or place[1][0] != "_" or not isinstance(value, Tensor)) and type(value) not in SIMPLE:
                found._visit(place, value)
        old = {id(t) for _, t in self.tensors}
        made = {id(t): t for _, t in found.tensors if t.grad_fn is not None and id(t) not in old}
        if hidden:
            counts = zip(self._counted, self._written, strict=True)
            made |= {id(t): t for (_, t), (version, _) in counts if t._version != version and t.grad_fn is not None}
        return list(made.values())

    def _differences(self, same_attributes: bool = False) -> Iterator[tuple[Place, Place | None, Any]]:
        """Where another object is now than then; what it was added to, if nothing was there; and the object.

        With ``same_attributes`` modules are known to have the attributes and buffers that they had.
        """
        for m, held in self.modules if not same_attributes else ():
            here = id(m)
            for now, then in ((vars(m), held.attributes), (m._buffers, held.buffers)):
                for key, value in now.items():
                    if value is not then.get(key, _MISSING) and key not in OWN:
                        yield (here, key), None if key in then else (here,), value
        for place, container, before in self.containers:
            if not _is_same(container, before):
                for key, added, value in _unlike(container, before):
                    yield (*place, key), place if added else None, value


class _Contents:
    """What is in some dictionaries, by identity."""

    def __init__(self, dictionaries: Sequence[dict[Any, Any]]) -> None:
        self._sizes = [*map(len, dictionaries)]
        self._keys = [*chain.from_iterable(dictionaries)]
        self._values = [*chain.from_iterable(map(dict.values, dictionaries))]

    def are_in(self, dictionaries: Sequence[dict[Any, Any]]) -> bool:
        """Whether these hold the very same under the same keys, in the same order; without a step in Python for each."""
        return (
            [*map(len, dictionaries)] == self._sizes
            and [*chain.from_iterable(dictionaries)] == self._keys
            and all(map(operator.is_, chain.from_iterable(map(dict.values, dictionaries)), self._values))
        )


def same_array(one: Any, other: Any) -> bool:
    """Whether two arrays hold the same, NaN and all."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind == "V":
        return bool(one.tobytes() == other.tobytes())
    same = one == other
    return bool(same.all() if one.dtype.kind not in "fc" else (same | ((one != one) & (other != other))).all())


def _is_object(kind: type) -> bool:
    """Whether ``kind`` is a class of somebody's own, whose objects keep their state in attributes."""
    if not kind.__dictoffset__ or issubclass(kind, type):
        return False
    return issubclass(kind, SimpleNamespace) or not _is_library(str(kind.__module__).partition(".")[0])


@cache
def _is_library(package: str) -> bool:
    """Whether objects of classes from there are not looked into; a package may have the name of one that comes with Python."""
    file = getattr(sys.modules.get(package), "__file__", None)
    if package in sys.stdlib_module_names:
        return file is None or file.startswith(sysconfig.get_paths()["stdlib"])
    return package in ("torch", "numpy", "dp_hooks")


def _writes(tensors: Iterable[tuple[Place, Tensor]]) -> list[tuple[int, int]]:
    """For each how often it was written to, and where its values are: what is set as ``.data`` has the same version."""
    strided = torch.strided
    return [(t._version, t.data_ptr() if type(t) in _ADDRESSED and t.layout is strided else 0) for _, t in tensors]


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    return dict.items(container) if isinstance(container, dict) else enumerate(container)


def _copied(container: Any) -> Any:
    """What is in a container, whatever its class makes of that: a plain dictionary, set or list."""
    if isinstance(container, dict):
        return dict(dict.items(container))
    return set(container) if isinstance(container, set) else list(container)


def _refill(container: Any, before: Any) -> None:
    """Put in again what was in it, past methods of its own class."""
    if isinstance(container, list):
        list.__setitem__(container, slice(None), before)
        return
    base: Any = next(kind for kind in (OrderedDict, dict, set, deque) if isinstance(container, kind))
    base.clear(container)
    (base.extend if base is deque else base.update)(container, before)


def _is_same(now: Any, then: Any) -> bool:
    """Whether a container holds the very objects of its copy, in their order."""
    if len(now) != len(then):
        return False
    if isinstance(now, set):
        return bool(now == then)
    if isinstance(now, dict):
        return all(map(operator.is_, dict.keys(now), then)) and all(map(operator.is_, dict.values(now), then.values()))
    return all(map(operator.is_, now, then))


def _unlike(now: Any, then: Any) -> Iterator[tuple[Any, bool, Any]]:
    """Where a container holds another object than its copy; whether it held nothing there; and the object."""
    if isinstance(now, set):
        yield None, False, list(now)
    elif isinstance(now, dict):
        different = [(key, key not in then, value) for key, value in dict.items(now) if value is not then.get(key, _MISSING)]
        yield from different
        if not different or len(now) < len(then):
            yield None, False, None  # something is gone, or in another order
    else:
        for i, (value, before) in enumerate(zip_longest(now, then, fillvalue=_MISSING)):
            if value is not before:
                yield i, before is _MISSING, None if value is _MISSING else value
