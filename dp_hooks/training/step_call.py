"""StepCall: one call of a train function: the scope that it steps, and which of its arguments is the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._validate import bad
from ..capture.validate import uncompiled
from ..errors import InvalidArgumentError, ScopeError
from .processes import replicated
from .scope import PrivateTraining, open_scopes

Named = PrivateTraining | Callable[[], PrivateTraining]
_METHOD = (
    "(The first argument was a {}: it has to be the model, or, of a method, the one after self. For anything else name the scope: "
    "@dp_step(scope=scope).)"
)


@dataclass(frozen=True)
class StepCall:
    """The arguments of a call, with the batch at position ``at``."""

    fn: Callable[..., Any]
    scope: PrivateTraining
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: int

    @classmethod
    def of(cls, fn: Callable[..., Any], named: Named | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall:
        """Find out what a call of ``fn`` is about; ``named`` is the scope that it was decorated with.

        Raises:
            ScopeError: no scope is open there.
            InvalidArgumentError: there is no batch among the arguments, or another model in its place.
        """
        at = _position(args, named is not None)
        if at >= len(args):  # some were given by their names
            bound = inspect.signature(fn).bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
            at = _position(args, named is not None)
        if at >= len(args):
            raise InvalidArgumentError(f"{name_of(fn)}() was called without a batch: it is the argument after the model.")
        scope = _over(fn, args[at - 1], args[0]) if named is None else _named(fn, named)
        if isinstance(args[at], nn.Module):
            raise InvalidArgumentError(
                f"{name_of(fn)}() was called with a {type(args[at]).__name__} where the batch has to be: after the model. Other "
                "models come after the batch; or name the scope, @dp_step(scope=scope): then they may come before it."
            )
        return cls(fn, scope, args, kwargs, at)

    @property
    def batch(self) -> Any:
        """The batch."""
        return self.args[self.at]

    @property
    def others(self) -> Any:
        """The arguments after it."""
        return self.args[self.at + 1 :], self.kwargs

    def on(self, batch: Any) -> Any:
        """Run the function on another batch."""
        return self.fn(*self.args[: self.at], batch, *self.args[self.at + 1 :], **self.kwargs)


def name_of(fn: Any) -> str:
    """The name of a function, for messages."""
    return getattr(fn, "__qualname__", repr(fn))


def check_named(scope: object) -> None:
    """Check the argument ``scope`` of the decorator.

    Raises:
        InvalidArgumentError: it is neither a scope nor a function.
    """
    if scope is not None and not isinstance(scope, PrivateTraining) and (not callable(scope) or isinstance(scope, type)):
        raise bad("scope", scope, "pass what private_training(...) returned, or a function without arguments that returns it.")


def _position(args: tuple[Any, ...], named: bool) -> int:
    """Where the batch is: after the model, the first argument or that after self; with a named scope after all models."""
    at = 1
    if named or not isinstance(args[0] if args else None, nn.Module):
        while at < len(args) and isinstance(args[at], nn.Module) and (named or at == 1):
            at += 1
    return at


def _named(fn: Callable[..., Any], named: Named) -> PrivateTraining:
    scope = named if isinstance(named, PrivateTraining) else named()
    if not isinstance(scope, PrivateTraining):
        raise bad("scope", scope, f"the function that {name_of(fn)}() was decorated with has to return an open private scope.")
    if not scope.is_open:
        raise ScopeError(
            f"{name_of(fn)}() steps the scope that it was decorated with, over a {type(scope.model).__name__}, and that one is not "
            "open here. Call it inside `with scope as (opt, loader):`; for scopes that come one after the other decorate with a "
            "function that returns the present one, @dp_step(scope=lambda: ...)."
        )
    return scope


def _over(fn: Callable[..., Any], model: object, first: object) -> PrivateTraining:
    scope = open_scopes.of(uncompiled(replicated(model)))
    if scope is None or not scope.is_open:
        raise ScopeError(
            f"{name_of(fn)}() is a private train step, but no private_training scope over this model is open here. Call it "
            "inside `with private_training(model, ...) as (opt, loader):`, with that same model as first argument."
            + ("" if isinstance(model, nn.Module) else f" {_METHOD.format(type(first).__name__)}")
        )
    return scope
