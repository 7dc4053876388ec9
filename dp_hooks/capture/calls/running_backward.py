"""What a backward pass that is running began with."""

import sys
from types import FrameType

import torch
from torch import Tensor


def losses_in_backward(*, outermost: bool = False) -> list[Tensor] | None:
    """What ``backward`` is running on, in this thread or, where the graph is on another device, in the one that waits.

    That may be one of several: then what all of these are running on. None if it cannot be found. Where one runs inside of
    another, as that of a checkpoint does, it is the inner one, or the ``outermost``.
    """
    found = _losses_below(sys._getframe(1), outermost)
    if found is not None:
        return found
    elsewhere = [_losses_below(frame, outermost) for frame in sys._current_frames().values()]
    losses = [loss for some in elsewhere if some is not None for loss in some]
    return losses or None


def _losses_below(frame: FrameType | None, outermost: bool) -> list[Tensor] | None:
    """What the innermost ``backward`` of one thread is running on, or the outermost; None if there is none."""
    found = None
    try:
        while frame is not None and (found is None or outermost):
            found = _begun_by(frame) or found
            frame = frame.f_back
        return found
    finally:
        del frame  # one that refers to itself would live until the garbage collector comes, and the graph with it


def _begun_by(frame: FrameType) -> list[Tensor] | None:
    """What the call of ``backward`` in this frame is on, if it is one."""
    if frame.f_code is torch.Tensor.backward.__code__ and isinstance(frame.f_locals.get("self"), Tensor):
        return [frame.f_locals["self"]]
    if frame.f_code is not torch.autograd.backward.__code__:
        return None
    tensors = frame.f_locals.get("tensors")
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors or ())
    return found if all(isinstance(t, Tensor) for t in found) else None
