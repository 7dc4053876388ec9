"""Optimizers that are stepped in a private scope, and are not the private one."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..errors import ScopeError, some_of
from .outside import OutsideGradients

# Handles of what is global: their weak references would be empty if the garbage collector ended a scope that alone has them.
_guards: dict[int, RemovableHandle] = {}


class OtherOptimizers:
    """Refuses steps of optimizers over parameters that are managed, unless they are allowed, and over raw gradients always."""

    def __init__(
        self, original: torch.optim.Optimizer, params: Sequence[nn.Parameter], model: nn.Module, outside: OutsideGradients
    ) -> None:
        """``original`` is the optimizer that the private one steps; managed are ``params``, and whatever is in ``model``."""
        self._original = original
        self._params = params
        self._model = model
        self._outside = outside
        self.are_allowed = False

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """In the block they may step managed parameters, too."""
        self.are_allowed = True
        try:
            yield
        finally:
            self.are_allowed = False

    def watch(self, stack: ExitStack) -> None:
        """Look at every step of an optimizer until ``stack`` unwinds."""
        this = weakref.ref(self)  # the hook is global, and must not keep the scope alive

        def guard(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            others = this()
            if others is not None:
                others._check(optimizer)

        handle = register_optimizer_step_pre_hook(guard)
        _guards[handle.id] = handle
        stack.callback(_remove_guard, handle.id)

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        raw = self._outside.held_by(optimizer)
        if raw:
            shapes = some_of([f"{type(p).__name__} {tuple(p.shape)}" for p in raw])
            raise ScopeError(
                f"{type(optimizer).__name__} was about to apply gradients of private samples, neither clipped nor noised, to "
                f"{shapes} outside the model. Make what the loss trains one module, and enter the scope with it; if this optimizer "
                "only has a loss of its own, clear these gradients first (its zero_grad()), or detach what the private loss takes "
                "from there."
            )
        if self.are_allowed:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        if optimizer is self._original or any(id(p) in held for p in chain(self._params, self._model.parameters())):
            which = "the original optimizer" if optimizer is self._original else f"another optimizer ({type(optimizer).__name__})"
            raise ScopeError(
                f"{which} was stepped inside a private scope: that step would have neither noise nor charge. Step the optimizer "
                "that the scope returned; for steps on public data use `with scope.paused():`."
            )


def _remove_guard(number: int) -> None:
    _guards.pop(number).remove()
