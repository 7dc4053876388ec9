"""Which models are in which open scopes."""

import threading
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Generic, TypeVar

from torch import nn

from ..errors import ScopeError

Scope = TypeVar("Scope")


class Claims(Generic[Scope]):
    """The open scopes: each module and parameter is in one of them at most, in whatever thread that is."""

    def __init__(self) -> None:
        """No scope is open."""
        self._lock = threading.Lock()
        self._claimed: set[int] = set()
        self._open: ContextVar[tuple[tuple[nn.Module, Scope], ...]] = ContextVar("dp_hooks_scopes", default=())

    def claim(self, model: nn.Module, scope: Scope, stack: ExitStack) -> None:
        """Claim ``model`` for ``scope`` until ``stack`` unwinds.

        Raises:
            ScopeError: a module or parameter of it is in another open scope.
        """
        keys = {id(m) for m in model.modules()} | {id(p) for p in model.parameters()}
        with self._lock:
            if keys & self._claimed:
                raise ScopeError(
                    f"the model {type(model).__name__}, or a part of it, is already in an open private scope. "
                    "Leave that scope first (engine.cleanup() for an engine); its steps and these would not be "
                    "accounted together."
                )
            self._claimed |= keys
        stack.callback(self._let_go, scope, keys)
        self._open.set((*self._open.get(), (model, scope)))

    def _let_go(self, scope: Scope, keys: set[int]) -> None:
        self._open.set(tuple(pair for pair in self._open.get() if pair[1] is not scope))
        with self._lock:
            self._claimed -= keys

    def innermost(self, model: object) -> Scope | None:
        """Return the open scope over ``model`` that was opened last in the present context, or None."""
        return next((scope for claimed, scope in reversed(self._open.get()) if claimed is model), None)
