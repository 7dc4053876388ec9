"""ParameterSwap: puts other tensors where a module keeps its parameters for a while, and the parameters back again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_RNN_LISTS = ("_flat_weights", "_flat_weight_refs")


@dataclass(eq=False)
class ParameterSwap:
    """The trainable parameters of ``module`` (with ``recurse`` also of its descendants) and where they are stored.

    Parameters are known by module and name as found when the places were made. ``put`` and ``restore`` write to the modules'
    dictionaries: no ``setattr`` runs, ``requires_grad`` never changes, and after ``restore`` the very same objects are in place.
    """

    module: nn.Module
    recurse: bool
    active: "dict[int, ParameterSwap]" = field(default_factory=dict)
    params: dict[str, nn.Parameter] = field(init=False)
    places: list[tuple[nn.Module, str, str]] = field(init=False)
    _names: dict[tuple[str, ...], dict[nn.Parameter, str]] = field(default_factory=dict, init=False)
    # Recurrent layers notice in forward that their weights changed, and renew a second list of them.
    _recurrent: list[nn.RNNBase] = field(init=False)
    _lists: list[tuple[nn.RNNBase, dict[str, Any]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.params, self.places = {}, []
        seen: dict[int, str] = {}
        for prefix, owner in self.module.named_modules() if self.recurse else [("", self.module)]:
            for key, param in owner._parameters.items():
                if param is None or not param.requires_grad:
                    continue
                name = seen.setdefault(id(param), f"{prefix}.{key}" if prefix else key)
                self.params.setdefault(name, param)
                self.places.append((owner, key, name))
        owners = {id(owner): owner for owner, _, _ in self.places}
        self._recurrent = [owner for owner in owners.values() if isinstance(owner, nn.RNNBase)]

    @property
    def swapped(self) -> bool:
        """Whether other tensors are in place."""
        return id(self) in self.active

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Store ``tensors[name]`` wherever the parameter ``name`` was."""
        if self.swapped:
            self.restore()
        self.active[id(self)] = self
        for owner, key, name in self.places:
            owner._parameters[key] = tensors[name]  # type: ignore[assignment]
        for owner in self._recurrent:
            self._lists.append((owner, {key: vars(owner)[key] for key in _RNN_LISTS if key in vars(owner)}))

    def foreign(self) -> list[str]:
        """Names of the places that hold something else than the parameter found when the places were made."""
        params = self.params
        for owner, key, name in self.places:
            if owner._parameters.get(key) is not params[name]:
                break
        else:
            return []
        return [name for owner, key, name in self.places if owner._parameters.get(key) is not self.params[name]]

    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that require a gradient now."""
        with torch._C.DisableTorchFunction():  # quick, also while operations are followed
            return tuple([name for name, p in self.params.items() if p.requires_grad])

    def names_of(self, names: tuple[str, ...]) -> Mapping[nn.Parameter, str]:
        """The parameters with these ``names``, each with its name."""
        found = self._names.get(names)
        if found is None:
            found = self._names[names] = {self.params[name]: name for name in names}
        return found

    def detach(self) -> None:
        """Store the parameters' detached selves, so that autograd computes no gradient for them."""
        with torch._C.DisableTorchFunction():
            self.put({name: param.detach() for name, param in self.params.items()})

    @property
    def is_trainable(self) -> bool:
        """Whether some of the parameters require a gradient now."""
        with torch._C.DisableTorchFunction():
            for param in self.params.values():
                if param.requires_grad:
                    return True
        return False

    def restore(self) -> None:
        """Put the parameters back; harmless if they are in place."""
        for owner, key, name in self.places:
            owner._parameters[key] = self.params[name]
        while self._lists:
            owner, lists = self._lists.pop()
            vars(owner).update(lists)
        self.active.pop(id(self), None)
