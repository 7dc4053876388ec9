"""Gradients of private samples that a loss leaves at trainable tensors outside the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..capture.controller import HookController
from ..checks.single_samples import leaves_of


class OutsideGradients:
    """Knows which gradients outside the model are of private samples: raw ones, which no optimizer may apply.

    A head behind the model, a trainable prompt before it, a second model: autograd adds to their ``grad`` what neither clipping
    nor noise has seen. Whoever clears them first (a generator's own step does) may go on.
    """

    def __init__(self, controller: HookController) -> None:
        """Nothing is known."""
        self._controller = controller
        self._raw: list[tuple[TensorWeakRef, TensorWeakRef]] = []

    @contextmanager
    def of(self, losses: list[Tensor]) -> Iterator[None]:
        """Follow a train function in the block; afterwards, note what a backward pass of its ``losses`` left outside."""
        session = self._controller.session
        around, session.borders = session.borders, (set(), [])
        ends, starts = session.borders
        try:
            yield
        finally:
            session.borders = around
        self._note(leaves_of([*losses, *starts], ends))

    def look_inside(self, loss: Tensor) -> None:
        """Look in the model as well, of whose graph ``of`` sees the borders only: tensors in it that are no parameters of it."""
        self._note(leaves_of([loss]))

    def _note(self, leaves: list[Tensor]) -> None:
        inside = {id(p) for p in self._controller.model.parameters()}
        known = {id(leaf): leaf for leaf, _ in self._alive()}
        found = {id(leaf): leaf for leaf in leaves}
        outside = [leaf for number, leaf in (known | found).items() if number not in inside]
        self._raw = [(TensorWeakRef(leaf), TensorWeakRef(leaf.grad)) for leaf in outside if leaf.grad is not None]

    def held_by(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return the parameters of ``optimizer`` whose gradients are still those of private samples."""
        if not self._raw:
            return []
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [leaf for leaf, grad in self._alive() if id(leaf) in held and leaf.grad is grad]

    def clear(self) -> None:
        """Drop what is still there."""
        for leaf, grad in self._alive():
            if leaf.grad is grad:
                leaf.grad = None
        self._raw = []

    def _alive(self) -> list[tuple[Tensor, Tensor]]:
        pairs = ((leaf(), grad()) for leaf, grad in self._raw)
        return [(leaf, grad) for leaf, grad in pairs if leaf is not None and grad is not None]
