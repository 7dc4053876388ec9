"""Gradients of private samples that a loss leaves at trainable tensors outside the model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


class OutsideGradients:
    """Knows which gradients outside the model are of private samples: raw ones, which no optimizer may apply.

    A head behind the model, a trainable prompt before it, a second model: autograd adds to their ``grad`` what neither clipping
    nor noise has seen. Whoever clears them first (a generator's own step does) may go on.
    """

    def __init__(self) -> None:
        """Nothing is known."""
        self._leaves: list[TensorWeakRef] = []
        self._raw: list[tuple[TensorWeakRef, TensorWeakRef]] = []

    def look(self, loss: Tensor, model: nn.Module) -> None:
        """Find the tensors outside ``model`` that a backward pass of ``loss`` gave gradients; it may be over already."""
        inside = {id(p) for p in model.parameters()}
        known = {id(leaf) for leaf in _alive(self._leaves)}
        found = [leaf for leaf in _leaves_of(loss) if leaf.grad is not None and id(leaf) not in inside | known]
        self._leaves += [TensorWeakRef(leaf) for leaf in found]

    def note(self) -> None:
        """Remember the gradients that the backward pass just done left at the tensors found so far."""
        if self._leaves:
            leaves = _alive(self._leaves)
            self._leaves = [TensorWeakRef(leaf) for leaf in leaves]
            self._raw = [(TensorWeakRef(p), TensorWeakRef(p.grad)) for p in leaves if p.grad is not None]

    def held_by(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return the parameters of ``optimizer`` whose gradients are still those of private samples."""
        if not self._raw:
            return []
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        pairs = ((leaf(), grad()) for leaf, grad in self._raw)
        return [p for p, grad in pairs if p is not None and id(p) in held and grad is not None and p.grad is grad]


def _alive(refs: Iterable[TensorWeakRef]) -> list[Tensor]:
    return [tensor for tensor in (ref() for ref in refs) if tensor is not None]


def _leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the leaves that the graph of ``loss`` adds gradients to."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    leaves = []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [behind for behind, _ in node.next_functions]
    return leaves
