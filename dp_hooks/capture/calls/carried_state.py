"""CarriedState: what a model carries from one batch to the next, in buffers, frozen parameters and attributes, by value."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._rerun import copy_of, same_values, write_back
from ..._tree import as_real
from .module_state import OWN, SIMPLE, ModuleState, Place, same_array

_BLOCK = 1 << 18  # numbers


@dataclass(frozen=True)
class Unlike:
    """Names of what holds something else in two states, or is in one of them only."""

    trained: list[str]
    stored: list[str]  # buffers and frozen parameters
    attributes: list[str]

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.trained, *self.stored, *self.attributes]


class CarriedState:
    """Values, as they were when this was made, of all that :class:`.ModuleState` finds in a module."""

    def __init__(self, module: nn.Module, state: ModuleState | None = None) -> None:
        """Keep copies; the objects themselves are kept, too, to write into them again. ``state``: that of now, if it is known."""
        self._state = state = state or ModuleState(module)
        self._names = names = {id(m): name for name, m in module.named_modules()}
        self._tops: dict[str, Place] = {}  # for the name of a place, the attribute of a module that leads there
        names |= {number: self._name(place) for number, place in state.found_at.items()}
        self._trained: set[str] = set()
        # Tensors that are no state: those that are trained.
        kept = [(place, t) for place, t in state.tensors if not (t.is_leaf and t.requires_grad)]
        self._tensors = [(place, t, copy_of(t)) for place, t in kept]
        self._values: dict[str, Any] = {self._name(place): value for place, _, value in self._tensors}
        self._values |= {self._name(place): array for place, _, array in state.arrays}
        for m, held in state.modules:
            self._add(held.attributes, (id(m),), OWN)
            # A forward pass that writes to what is trained shows in sums; nobody puts that back.
            for key, p in m._parameters.items():
                if p is not None and p.requires_grad and (p.is_floating_point() or p.is_complex()) and not p.is_meta:
                    name = self._name((id(m), key))
                    self._values[name] = _sums(p)
                    self._trained.add(name)
        stored = [(id(m), key) for m, held in state.modules for key in (*held.buffers, *m._parameters)]
        self._stored = {self._name(place) for place in stored} - self._trained
        for place, _, contents in state.containers:
            if isinstance(contents, dict):
                self._add(contents, place)
            elif isinstance(contents, set):
                self._values[self._name(place)] = {item for item in contents if type(item) in SIMPLE}
            else:
                self._add(dict(enumerate(contents)), place)

    def _name(self, place: Place) -> str:
        """What leads to a place, from the name of a module on."""
        owner, key, *inside = place
        name = f"{self._names[owner]}.{key}" if self._names.get(owner) else str(key)
        name += "".join(f".{step}" if isinstance(step, str) else f"[{step!r}]" for step in inside)
        self._tops[name] = place[:2]
        return name

    def _add(self, values: dict[Any, Any], place: Place, but: Collection[str] = ()) -> None:
        for key, value in values.items():
            if type(value) in SIMPLE and key not in but:
                self._values[self._name((*place, key))] = value

    def put_back(self) -> None:
        """Make all objects what they were, and write all values back.

        In the place of tensors with a history, which is over, and of those made in inference mode there are ordinary ones then.
        """
        self._put_back(None)

    def overlay(self) -> None:
        """The same for the attributes only that this was :meth:`narrowed` to."""
        self._put_back({self._tops[name] for name in self._values})

    def narrowed(self, names: Collection[str]) -> "CarriedState":
        """What is at some places only."""
        other = copy.copy(self)
        other._values = {name: value for name, value in self._values.items() if name in names}
        tops = {self._tops[name] for name in other._values}
        other._tensors = [kept for kept in self._tensors if kept[0][:2] in tops]
        return other

    def _put_back(self, only: Collection[Place] | None) -> None:
        self._state.put_back(only)
        with torch.no_grad():
            for place, tensor, value in self._tensors:
                if only is not None and place[:2] not in only:
                    continue
                if tensor.grad_fn is not None or tensor.is_inference():
                    self._state.put(place, value.clone())
                else:
                    write_back(tensor, value)

    def unlike(self, other: "CarriedState") -> Unlike:
        """What is another in ``other``."""
        one, two = self._values, other._values
        names = [name for name in {**one, **two} if name not in one or name not in two or not _alike(one[name], two[name])]
        known = self._stored | self._trained
        return Unlike(
            [name for name in names if name in self._trained],
            [name for name in names if name in self._stored],
            [name for name in names if name not in known],
        )


def _sums(param: Tensor) -> Tensor:
    real = as_real(param.detach()).reshape(-1)
    # On a CPU they are copied to be added up in another dtype.
    blocks = real.split(_BLOCK) if real.device.type == "cpu" else [real]
    sums = [(block.sum(dtype=torch.float64), torch.linalg.vector_norm(block, dtype=torch.float64)) for block in blocks]
    return torch.stack([torch.stack(one) for one in sums])


def _alike(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and same_values(one, other)
    if hasattr(one, "dtype"):
        return same_array(one, other)
    return bool(one == other) or (one != one and other != other)
