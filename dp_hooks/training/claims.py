"""Which models are in which open scopes."""

import gc
import threading
import weakref
from contextlib import ExitStack
from typing import Generic, TypeVar

from torch import nn

from ..errors import ScopeError

Scope = TypeVar("Scope")


class Claims(Generic[Scope]):
    """The open scopes: each module and parameter is in one of them at most, in whatever thread that is. Keeps none alive."""

    def __init__(self) -> None:
        """No scope is open."""
        self._lock = threading.RLock()  # a scope may be collected, and let go, in the middle of a claim
        self._claimed: dict[int, weakref.ref[Scope]] = {}
        self._open: dict[weakref.ref[Scope], weakref.ref[nn.Module]] = {}

    def claim(self, model: nn.Module, scope: Scope, stack: ExitStack) -> None:
        """Claim ``model`` for ``scope`` until ``stack`` unwinds.

        Raises:
            ScopeError: a module or parameter of it is in another open scope.
        """
        keys = _keys(model)
        with self._lock:
            if keys & self._claimed.keys():
                gc.collect()  # a scope that was lost without an end goes now
            if keys & self._claimed.keys():
                raise ScopeError(
                    f"the model {type(model).__name__}, or a part of it, is already in an open private scope. Its steps and "
                    "these would not be accounted together. Leave that scope first (engine.cleanup() for an engine), or, where "
                    "nothing refers to the scope any more, call dp_hooks.release(model)."
                )
            mine = weakref.ref(scope)
            self._claimed.update(dict.fromkeys(keys, mine))
            self._open[mine] = weakref.ref(model)
        stack.callback(self._let_go, mine, keys)

    def _let_go(self, mine: "weakref.ref[Scope]", keys: set[int]) -> None:
        with self._lock:
            self._open.pop(mine, None)
            for key in keys:
                if self._claimed.get(key) is mine:
                    del self._claimed[key]

    def of(self, model: object) -> Scope | None:
        """Return the open scope over ``model`` itself, not a part of it, in whatever thread or task it was opened; else None."""
        with self._lock:
            mine = self._claimed.get(id(model))
            found = None if mine is None or self._open[mine]() is not model else mine
        return None if found is None else found()

    def over(self, model: nn.Module) -> list[Scope]:
        """Return the open scopes over ``model`` or a part of it, in whatever context they were opened."""
        with self._lock:
            found = (self._claimed[key]() for key in _keys(model) & self._claimed.keys())
            return list({id(scope): scope for scope in found if scope is not None}.values())


def _keys(model: nn.Module) -> set[int]:
    return {id(m) for m in model.modules()} | {id(p) for p in model.parameters()}
