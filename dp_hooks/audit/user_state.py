"""What an audit puts back: model, optimizer, and the generators that it drew from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._no_randomness import generators_kept
from .._rerun import write_back
from ..capture.calls.undisturbed import model_kept


@contextmanager
def kept(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, generator: torch.Generator | None) -> Iterator[None]:
    """Leave no trace of what is trained in the block.

    Afterwards these are as they were: parameters, buffers, gradients and attributes of ``model``, what is in the groups and the
    state
    of ``optimizer``, and generators: those of PyTorch, Python and NumPy, that of ``loader``, and ``generator``.
    """
    own = {id(p) for p in model.parameters()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    found = [generator, getattr(loader, "generator", None), getattr(getattr(loader, "batch_sampler", None), "generator", None)]
    generators = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    attributes = dict(vars(optimizer))
    held = _Held(own)
    for part in (optimizer.param_groups, optimizer.state):
        held.add(part)
    try:
        with model_kept(model, trained=True), generators_kept(devices):
            for p in model.parameters():
                p.grad = None  # else gradients would be added to it in place
            yield
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        held.put_back()
        for g, state in generators:
            g.set_state(state)


class _Held:
    """What is in some containers, down to the values of tensors."""

    def __init__(self, passed_over: set[int]) -> None:
        """Tensors with these ids are kept elsewhere."""
        self._seen = passed_over
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []

    def add(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, (dict, list)):
            self._seen.add(id(value))
            self._containers.append((value, value.copy()))
            for item in list(value.values() if isinstance(value, dict) else value):
                self.add(item)
        elif isinstance(value, Tensor):
            self._seen.add(id(value))
            self._tensors.append((value, value.detach().clone()))

    def put_back(self) -> None:
        for container, before in self._containers:
            container.clear()
            (container.update if isinstance(container, dict) else container.extend)(before)
        with torch.no_grad():
            for tensor, value in self._tensors:
                write_back(tensor, value)
