"""The way to run a model aside: what it changes in the model and around it is put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..._no_randomness import generators_kept
from ..._rerun import as_check, copy_of, write_back
from .module_state import ModuleState


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put every attribute of ``module`` and its descendants back to the very object it was before the block."""
    before = ModuleState(module)
    try:
        yield
    finally:
        before.put_back()


@contextmanager
def model_kept(model: nn.Module, *, trained: bool = False) -> Iterator[None]:
    """Put ``model`` back to what it was before the block.

    That are its attributes, the tensors in them, buffers, frozen parameters and gradients, and what is set on its parameters; and,
    with ``trained``, the values of trained parameters, and which are.
    """
    params = list(model.parameters())
    before = ModuleState(model, whole=True)
    tensors = {
        id(t): t for _, t in before.tensors if not t.is_inference() and not t.is_meta and not (t.is_leaf and t.requires_grad)
    }
    if trained:
        tensors |= {id(p): p for p in params}
    values = [(t, copy_of(t)) for t in tensors.values()]
    own = [(p, p.grad, p.requires_grad, dict(vars(p))) for p in params]
    try:
        yield
    finally:
        before.put_back()
        for p, grad, requires_grad, attributes in own:
            p.grad = grad
            if trained:
                p.requires_grad_(requires_grad)
            vars(p).clear()
            vars(p).update(attributes)
        with torch.no_grad():
            for tensor, value in values:
                write_back(tensor, value)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave no trace of what is run in the block, with gradients enabled.

    Afterwards ``model`` is as :func:`model_kept` leaves it, and the generators of PyTorch, Python and NumPy are as they were.
    """
    params = list(model.parameters())
    devices = sorted({p.device.index or 0 for p in params if p.device.type == "cuda"})
    with model_kept(model):
        for p in params:
            p.grad = None  # else gradients would be added to it in place
        with as_check(), generators_kept(devices), torch.enable_grad():
            yield
