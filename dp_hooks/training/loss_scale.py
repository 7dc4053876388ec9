"""A loss multiplied by a GradScaler's scale: per-sample clipping would meet gradients that are too large by it."""

import gc
from typing import Any

import torch

from ..capture.calls.running_backward import losses_in_backward
from ..errors import ScopeError

# How many operations may come after the scale: a mean over devices, a division by the number of accumulated batches.
_DEPTH = 4


def refuse_scaled_loss() -> None:
    """Look for a scale in the loss of the ``backward()`` that is running.

    By then autograd has let go of the number itself, so the loss is taken for a scaled one if it was multiplied by a constant
    while there is a ``GradScaler`` that has scaled something.

    Raises:
        ScopeError: it was scaled.
    """
    if any(_multiplied(loss.grad_fn, _DEPTH) for loss in losses_in_backward() or ()) and _scaler_in_use():
        raise ScopeError(
            "the loss was scaled by a GradScaler (scaler.scale(loss).backward()): its gradients are larger by that factor, and "
            "clipping and noise would not know of it. Call loss.backward() and opt.step() without the scaler; autocast alone is "
            "fine, since gradients are clipped in float32 here. (If the scaler belongs to another model: divide this loss by a "
            "number instead of multiplying it.)"
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
