"""Taps on results of the forward pass: a backward pass that comes by hands over the gradients it brings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hooked_modules import HookedModule
from .samples.tracker import Grads, Make

# Told of the use, how to get at the tensors that were saved, and the gradients that came back.
Arrived = Callable[["TappedCall", Callable[[], list[Tensor]], Grads], None]


@dataclass(eq=False)
class TappedCall:
    """One watched result of the forward pass, on its way to the backward pass. Holds no tensor: autograd does."""

    arrived: Arrived
    name: str
    batch_number: int
    inputs: list[Tensor]
    make: Make
    hooked: HookedModule | None = None


class Tap(torch.autograd.Function):
    """Identity on the outputs of a module; its backward hands the output gradients over.

    The outputs are returned as detached aliases: unlike ``mark_dirty`` this leaves their version counter alone (modules
    whose last operation saves its own result), and unlike a view they may be changed in place afterwards. The inputs go
    through ``save_for_backward``, so that a later in-place change of them is PyTorch's own error, and
    checkpointing can drop and recompute them.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, use: TappedCall, *outputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs; ``anchor`` requires a gradient, so that there is a backward pass."""
        ctx.use = use
        ctx.save_for_backward(*use.inputs)
        use.inputs = []
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Hand over the gradients, and pass them on."""
        if any(g is not None for g in grads):
            ctx.use.arrived(ctx.use, lambda: list(ctx.saved_tensors), list(grads))
        return (None, None, *grads)
