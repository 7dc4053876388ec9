"""Losses multiplied by a scale, so that small gradients survive float16: undone for each sample before it is clipped."""

import gc
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .._validate import bad
from ..capture.calls.running_backward import losses_in_backward
from ..errors import ScopeError
from .attributes import put
from .wrapped_optimizer import WrappedOptimizer

# How many operations may come after the scale: a mean over devices, a division by the number of accumulated batches.
_DEPTH = 4


class LossScale:
    """What losses are multiplied with in a scope: the scale that a ``GradScaler`` has when the scope is entered, or 1.

    While the scope is open that scale stays as it is. A scaler that follows overflows, as it does elsewhere, would let gradients
    of single samples decide, without noise, which steps are left out and how the next ones are rounded. Here no step is left out:
    samples that overflow are, one by one, as others that are not finite.

    Attributes:
        factor: the scale.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        """Of ``scaler``; None, or one that is switched off: losses are taken as they are.

        Raises:
            InvalidArgumentError: it is no ``GradScaler``, or its scale is no positive number.
        """
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise bad("grad_scaler", scaler, "pass the torch.amp.GradScaler of the training loop.")
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.factor = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        if not 0 < self.factor < float("inf"):
            raise bad("grad_scaler", scaler, f"its scale is {self.factor}; pass one with a positive init_scale.")
        self._scaled: list[weakref.ref[Tensor]] = []  # losses that were multiplied since the last step
        self._looked = False

    @property
    def is_held(self) -> bool:
        """Whether there is a scaler."""
        return self._scaler is not None

    def open(self, stack: ExitStack, optimizer: torch.optim.Optimizer) -> None:
        """Let the scaler multiply, and do nothing else, until ``stack`` unwinds; ``optimizer`` is the private one."""
        if self._scaler is None:
            return
        put(
            stack,
            self._scaler,
            scale=self._scale,
            unscale_=lambda *args, **kwargs: None,
            step=lambda stepped, *args, **kwargs: _stepped(optimizer, stepped, *args, **kwargs),
            update=lambda *args, **kwargs: None,
            get_scale=lambda: self.factor,
        )

    def _scale(self, outputs: Any) -> Any:
        """In the place of ``GradScaler.scale``."""
        if isinstance(outputs, Tensor):
            return self.note(self.multiplied(outputs))
        scaled = (self._scale(output) for output in outputs)
        return type(outputs)(scaled) if isinstance(outputs, (list, tuple)) else scaled

    def multiplied(self, loss: Tensor, shared_by: int = 1) -> Tensor:
        """``loss`` times the scale, or a part of it, in float32 at least: float16 has no room for it."""
        if self._scaler is None:
            return loss
        return (loss.float() if loss.dtype == torch.float16 else loss) * (self.factor / shared_by)

    def divided(self, loss: Tensor) -> Tensor:
        """What ``loss`` was before it was multiplied."""
        return loss if self._scaler is None else loss / self.factor

    def note(self, loss: Tensor) -> Tensor:
        """``loss``, which was multiplied by the scale as a whole, will be gone back from."""
        if self._scaler is not None:
            self._scaled.append(weakref.ref(loss))
        return loss

    def check_pass(self) -> None:
        """A backward pass of the user's comes to its end.

        Raises:
            ScopeError: its loss was not multiplied by the scale alone, or by that of a scaler that the scope was not told of.
        """
        if self._scaler is None:
            if not self._looked:  # once: that takes long
                _refuse_scaled_loss()
            self._looked = True
            return
        losses = losses_in_backward(outermost=True)
        known = [ref() for ref in self._scaled]
        if losses is None or all(any(loss is one for one in known) for loss in losses):
            return
        raise ScopeError(
            "the loss of this backward pass did not come from scaler.scale() as it is, but the scope was given that scaler "
            "(grad_scaler=...), and divides every gradient by its scale. Remedy: scaler.scale(loss).backward() in every step, with "
            "weights and sums of losses inside of scale(); or leave grad_scaler out."
        )

    def new_step(self) -> None:
        """What was multiplied until now was used."""
        self._scaled.clear()

    def undone(self, weights: Tensor | None, samples: int, device: torch.device) -> Tensor | None:
        """What the gradients of ``samples`` are multiplied with before they are clipped: ``weights``, and one over the scale."""
        if self._scaler is None:
            return weights
        return torch.full((samples,), 1 / self.factor, device=device) if weights is None else weights / self.factor


def _stepped(private: torch.optim.Optimizer, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of ``GradScaler.step``."""
    inner = optimizer
    while isinstance(inner, WrappedOptimizer) and inner is not private:
        inner = inner.original_optimizer
    if inner is not private:
        raise ScopeError(
            f"scaler.step() of another optimizer ({type(optimizer).__name__}) than the one that the private scope hands out. Its "
            "scale is that of the private step while the scope is open: use a scaler of its own for another optimizer."
        )
    return optimizer.step(*args, **kwargs)


def _refuse_scaled_loss() -> None:
    """Look for a scale in the loss of the ``backward()`` that is running.

    By then autograd has let go of the number itself, so the loss is taken for a scaled one if it was multiplied by a constant
    while there is a ``GradScaler`` that has scaled something.

    Raises:
        ScopeError: it was scaled.
    """
    if any(_multiplied(loss.grad_fn, _DEPTH) for loss in losses_in_backward() or ()) and _scaler_in_use():
        raise ScopeError(
            "the loss was scaled by a GradScaler (scaler.scale(loss).backward()): its gradients are larger by that factor, and "
            "clipping and noise would not know of it. Pass it to the scope (grad_scaler=scaler), or call loss.backward() and "
            "opt.step() without it: bfloat16 needs none. (If the scaler belongs to another model: divide this loss by "
            "a number instead of multiplying it.)"
        )


def _multiplied(node: Any, depth: int) -> bool:
    if node is None or depth == 0:
        return False
    parents = [parent for parent, _ in node.next_functions]
    if type(node).__name__ == "MulBackward0" and None in parents:
        return True
    return len(parents) == 1 and _multiplied(parents[0], depth - 1)


def _scaler_in_use() -> bool:
    if not _scalers():
        return False
    gc.collect()  # one that is dead and not collected yet scales no loss
    # One that is switched off has no scale at all, and in one that has scaled nothing yet it is None.
    return any(getattr(scaler, "_scale", None) is not None for scaler in _scalers())


def _scalers() -> list[torch.amp.GradScaler]:
    kinds = _with_subclasses(torch.amp.GradScaler)
    return [held for held in gc.get_referrers(*kinds) if type(held) in kinds]  # every object refers to its class


def _with_subclasses(kind: type) -> list[type]:
    below: list[type] = kind.__subclasses__()
    return [kind, *(one for each in below for one in _with_subclasses(each))]
